// The transform of the block: per branch and sample
//
//   t = w2 act(norm(w1 ctx + b1)) + b2,    or t = w1 ctx + b1 without a w2.
//
// The hidden units are w1 ctx + b1, norm(h) = n gamma + beta with n = (h - mean) / std, and z is what the activation gets.
#pragma once

#include <cmath>

#include "parallel.h"
#include "tensors.h"

namespace gcnet_ext::cpu {

constexpr int64_t kRowsPerItem = 16;      // rows of W that one item of work multiplies
constexpr int64_t kColumnsPerItem = 64;   // columns of W, where the sum runs over its rows
constexpr int64_t kRowsPerPartial = 256;  // rows of W that go into one partial sum

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body with a pointer to the weight in its own type. A float64 block has its weights in float64.
template <typename acc, typename Body>
void with_weight(const Tensor& weight, const Body& body) {
  if constexpr (std::is_same_v<acc, double>) {
    body(mutable_data<double>(weight));
  } else {
    switch (weight.scalar_type()) {
      case ScalarType::Half: return body(mutable_data<Half>(weight));
      case ScalarType::BFloat16: return body(mutable_data<BFloat16>(weight));
      default: return body(mutable_data<float>(weight));
    }
  }
}

template <typename acc>
OptionalTensor dense_weight(const OptionalTensor& weight) {
  if (!weight) return std::nullopt;
  if (std::is_same_v<acc, double> && weight->scalar_type() == ScalarType::Float) {
    return torch::stable::to(dense(*weight), ScalarType::Double);
  }
  return dense(*weight);
}

// Replaces t by sigmoid(t), or by alpha t + beta for the hard sigmoid.
template <typename acc>
void apply_gate(const Options& options, acc* t, int64_t count) {
  if (!options.hard_gate) return vector_kernels<acc>().sigmoid(t, count);
  const acc alpha = static_cast<acc>(options.hard_gate->alpha), beta = static_cast<acc>(options.hard_gate->beta);
  for (int64_t i = 0; i < count; i++) t[i] = alpha * t[i] + beta;
}

// What the backward pass of a branch leaves for the gradients of its weights: [N, H] each, one behind the other in [4 N, H].
template <typename acc>
struct HiddenLayer {
  Matrix<acc> normalised, activated;     // n and act(z)
  Matrix<acc> grad_affine, grad_hidden;  // the gradients of z and of the hidden units

  static HiddenLayer in(const Matrix<acc>& memory) {
    const int64_t samples = memory.rows / 4;
    return {memory.row_range(0, samples), memory.row_range(samples, samples), memory.row_range(2 * samples, samples),
            memory.row_range(3 * samples, samples)};
  }

  HiddenLayer samples(int64_t first, int64_t count) const {
    return {normalised.row_range(first, count), activated.row_range(first, count), grad_affine.row_range(first, count),
            grad_hidden.row_range(first, count)};
  }
};

// One branch: its weights, ready for the kernels. A matrix has a row for each sample.
template <typename acc>
class BranchPass {
 public:
  BranchPass(const Branch& branch, const Options& options, int64_t channels)
      : options_(options),
        channels_(channels),
        units_(branch.units()),
        w1_(dense_weight<acc>(branch.w1)),
        w2_(dense_weight<acc>(branch.w2)),
        b1_(to_acc<acc>(branch.b1)),
        norm_weight_(to_acc<acc>(branch.norm_weight)),
        norm_bias_(to_acc<acc>(branch.norm_bias)),
        b2_(to_acc<acc>(branch.b2)) {}

  // Bytes of w1 and w2: what one application of the branch reads.
  int64_t weight_bytes() const {
    const auto bytes = [](const OptionalTensor& weight) { return weight ? weight->numel() * weight->element_size() : 0; };
    return bytes(w1_) + bytes(w2_);
  }
  // Whether the threads share the rows of the weights; otherwise a sample's transform is one thread's work.
  bool row_parallel() const { return (w2_ ? 2 : 1) * channels_ * units_ > kBatchedWeights; }

  // hidden = w1 ctx + b1, and t. If it is gated, the values of the gate come in the place of t: sigmoid(t), or alpha t + beta
  // before it is clipped, which tells a gate that is at its corner from one that is beyond.
  void forward(Matrix<const acc> context, bool gated, Matrix<acc> hidden, Matrix<acc> t) const {
    const MatrixBuffer<acc> activated(context.rows, units_, w2_.has_value());
    for_samples(context.rows, [&](int64_t first, int64_t count) {
      const Matrix<acc> h = hidden.row_range(first, count), out = t.row_range(first, count);
      linear(*w1_, context.row_range(first, count), b1_, /*gated=*/false, h);
      if (!w2_) {
        for (int64_t i = 0; i < count; i++) {
          std::copy_n(h.row(i), channels_, out.row(i));
          if (gated) apply_gate(options_, out.row(i), channels_);
        }
        return;
      }
      const Matrix<acc> a = activated.row_range(first, count);
      for (int64_t i = 0; i < count; i++) activate(h.row(i), /*normalised=*/nullptr, a.row(i));
      linear(*w2_, a, b2_, gated, out);
    });
  }

  // H, or 0 without a hidden layer.
  int64_t hidden_units() const { return w2_ ? units_ : 0; }
  // grad_context += the gradient through the branch.
  void backward(Matrix<const acc> grad_t, Matrix<const acc> hidden, const HiddenLayer<acc>& layer,
                Matrix<acc> grad_context) const {
    for_samples(grad_t.rows, [&](int64_t first, int64_t count) {
      const Matrix<const acc> grad_out = grad_t.row_range(first, count);
      const HiddenLayer<acc> of_samples = layer.samples(first, count);
      if (w2_) {
        const MatrixBuffer<acc> grad_activated(count, units_);
        linear_backward_input(*w2_, grad_out, grad_activated);
        for (int64_t i = 0; i < count; i++) {
          const acc inverse_std = activate(hidden.row(first + i), of_samples.normalised.row(i), of_samples.activated.row(i));
          activate_backward(grad_activated.row(i), inverse_std, of_samples.samples(i, 1));
        }
      }
      const MatrixBuffer<acc> grad_input(count, channels_);
      linear_backward_input(*w1_, w2_ ? Matrix<const acc>(of_samples.grad_hidden) : grad_out, grad_input);
      for (int64_t i = 0; i < count; i++) {
        for (int64_t c = 0; c < channels_; c++) grad_context.row(first + i)[c] += grad_input.row(i)[c];
      }
    });
  }
  // After backward() of all samples: the gradients of the six weights, sums over the samples in their order.
  void parameter_gradients(Matrix<const acc> grad_t, Matrix<const acc> context, const HiddenLayer<acc>& layer,
                           const PerWeight<Tensor>& gradients) const;

 private:
  // body(first, count) for all samples: together if the threads share the weights, otherwise one by one.
  template <typename Body>
  void for_samples(int64_t samples, const Body& body) const {
    if (row_parallel()) return body(0, samples);
    parallel_for(samples, samples * channels_ * units_, [&](int64_t i) { body(i, 1); });
  }
  // y = x W^T + bias, and the gradients of x and of W.
  void linear(const Tensor& weight, Matrix<const acc> x, const std::vector<acc>& bias, bool gated, Matrix<acc> y) const;
  void linear_backward_input(const Tensor& weight, Matrix<const acc> grad_y, Matrix<acc> grad_x) const;
  void linear_backward_weight(Matrix<const acc> grad_y, Matrix<const acc> x, const Tensor& gradient) const;
  acc affine(acc normalised, int64_t j) const;
  acc activate(const acc* hidden, acc* normalised, acc* activated) const;
  void activate_backward(const acc* grad_activated, acc inverse_std, const HiddenLayer<acc>& sample) const;

  // With at most so many weights, one thread transforms a sample. With more, the threads share the rows of the weights and
  // read each row once for many samples. (Bytes would be the wrong measure, because this saves loads and conversions.)
  static constexpr int64_t kBatchedWeights = 64 << 10;

  Options options_;
  int64_t channels_, units_;
  OptionalTensor w1_, w2_;
  std::vector<acc> b1_, norm_weight_, norm_bias_, b2_;
};

template <typename acc>
void BranchPass<acc>::linear(const Tensor& weight, Matrix<const acc> x, const std::vector<acc>& bias, bool gated,
                             Matrix<acc> y) const {
  with_weight<acc>(weight, [&](auto* w) {
    const auto kernel = matrix_kernels<acc, std::remove_pointer_t<decltype(w)>>().linear;
    const auto rows_of_w = [&](int64_t m0, int64_t m1) {
      const Matrix<acc> part = y.column_range(m0, m1 - m0);
      kernel(x, {w + m0 * x.columns, m1 - m0, x.columns, x.columns}, bias.empty() ? nullptr : bias.data() + m0, part);
      for (int64_t n = 0; gated && n < part.rows; n++) apply_gate(options_, part.row(n), part.columns);
    };
    if (!row_parallel()) return rows_of_w(0, y.columns);
    parallel_ranges(ceil_div(y.columns, kRowsPerItem), x.rows * y.columns * x.columns, [&](int64_t begin, int64_t end) {
      rows_of_w(begin * kRowsPerItem, std::min(y.columns, end * kRowsPerItem));
    });
  });
}

template <typename acc>
void BranchPass<acc>::linear_backward_input(const Tensor& weight, Matrix<const acc> grad_y, Matrix<acc> grad_x) const {
  const int64_t count = grad_y.rows, rows = grad_y.columns, columns = grad_x.columns;
  with_weight<acc>(weight, [&](auto* w) {
    using weight_t = std::remove_pointer_t<decltype(w)>;
    const auto kernel = matrix_kernels<acc, weight_t>().linear_backward_input;
    const Matrix<const weight_t> all{w, rows, columns, columns};
    if (!row_parallel()) return kernel(grad_y, all, grad_x);
    const int64_t partials = ceil_div(rows, kRowsPerPartial), slices = ceil_div(columns, kColumnsPerItem);
    const MatrixBuffer<acc> parts(partials * count, columns);
    parallel_for(partials * slices, count * rows * columns, [&](int64_t i) {
      const int64_t m0 = i / slices * kRowsPerPartial, m = std::min(rows - m0, kRowsPerPartial);
      const int64_t k0 = i % slices * kColumnsPerItem, k = std::min(columns - k0, kColumnsPerItem);
      const Matrix<acc> part = parts.row_range(i / slices * count, count);
      kernel(grad_y.column_range(m0, m), all.row_range(m0, m).column_range(k0, k), part.column_range(k0, k));
    });
    parallel_for(count, partials * count * columns, [&](int64_t n) {
      acc* total = grad_x.row(n);
      std::fill_n(total, columns, acc(0));
      for (int64_t part = 0; part < partials; part++) {
        const acc* values = parts.row(part * count + n);
        for (int64_t k = 0; k < columns; k++) total[k] += values[k];
      }
    });
  });
}

template <typename acc>
void BranchPass<acc>::linear_backward_weight(Matrix<const acc> grad_y, Matrix<const acc> x, const Tensor& gradient) const {
  if (gradient.numel() == 0) return;
  const int64_t rows = grad_y.columns, columns = x.columns;
  const bool widened = std::is_same_v<acc, double> && gradient.scalar_type() == ScalarType::Float;
  const Tensor target = widened ? empty(gradient, {rows, columns}, ScalarType::Double) : gradient;
  with_weight<acc>(target, [&](auto* w) {
    using weight_t = std::remove_pointer_t<decltype(w)>;
    const auto kernel = matrix_kernels<acc, weight_t>().linear_backward_weight;
    const Matrix<weight_t> all{w, rows, columns, columns};
    parallel_for(ceil_div(rows, kRowsPerItem), x.rows * rows * columns, [&](int64_t i) {
      const int64_t m0 = i * kRowsPerItem, m = std::min(rows - m0, kRowsPerItem);
      kernel(grad_y.column_range(m0, m), x, all.row_range(m0, m));
    });
  });
  if (widened) from_acc(data<acc>(target), gradient);
}

// z_j from n_j: the affine part of the norm, for hidden unit j.
template <typename acc>
acc BranchPass<acc>::affine(acc normalised, int64_t j) const {
  acc z = normalised;
  if (options_.norm_eps && !norm_weight_.empty()) z *= norm_weight_[j];
  if (options_.norm_eps && !norm_bias_.empty()) z += norm_bias_[j];
  return z;
}

// activated = act(z) for one sample, and n unless `normalised` is null. Returns 1 / std.
template <typename acc>
acc BranchPass<acc>::activate(const acc* hidden, acc* normalised, acc* activated) const {
  acc mean = 0, inverse_std = 1;
  if (options_.norm_eps) {
    acc variance;
    vector_kernels<acc>().moments(hidden, units_, &mean, &variance);
    inverse_std = acc(1) / std::sqrt(variance + acc(*options_.norm_eps));
  }
  for (int64_t j = 0; j < units_; j++) {
    const acc n = (hidden[j] - mean) * inverse_std;
    if (normalised) normalised[j] = n;
    activated[j] = affine(n, j);
  }
  vector_kernels<acc>().activation(options_.activation, static_cast<acc>(options_.slope), activated, units_);
  return inverse_std;
}

// The gradients of one sample's hidden layer, whose normalised units and inverse_std are those of activate().
template <typename acc>
void BranchPass<acc>::activate_backward(const acc* grad_activated, acc inverse_std, const HiddenLayer<acc>& sample) const {
  const acc* normalised = sample.normalised.data;
  acc *grad_affine = sample.grad_affine.data, *grad_hidden = sample.grad_hidden.data;
  acc* z = grad_hidden;  // until the gradient takes its place
  for (int64_t j = 0; j < units_; j++) z[j] = affine(normalised[j], j);
  std::copy_n(grad_activated, units_, grad_affine);
  vector_kernels<acc>().activation_gradient(options_.activation, static_cast<acc>(options_.slope), z, units_, grad_affine);
  acc sum = 0, dot = 0;
  for (int64_t j = 0; j < units_; j++) {
    const acc scaled = options_.norm_eps && !norm_weight_.empty() ? grad_affine[j] * norm_weight_[j] : grad_affine[j];
    grad_hidden[j] = scaled;
    sum += scaled;
    dot += scaled * normalised[j];
  }
  if (!options_.norm_eps) return;
  for (int64_t j = 0; j < units_; j++) {
    grad_hidden[j] = inverse_std * (grad_hidden[j] - (sum + normalised[j] * dot) / acc(units_));
  }
}

template <typename acc>
void BranchPass<acc>::parameter_gradients(Matrix<const acc> grad_t, Matrix<const acc> context, const HiddenLayer<acc>& layer,
                                          const PerWeight<Tensor>& gradients) const {
  const auto column_sums = [&](Matrix<const acc> values, Matrix<const acc> factors, const Tensor& gradient, bool used = true) {
    if (gradient.numel() == 0) return;
    std::vector<acc> sums(values.columns);
    for (int64_t n = 0; used && n < values.rows; n++) {
      for (int64_t j = 0; j < values.columns; j++) sums[j] += values.row(n)[j] * (factors.data ? factors.row(n)[j] : acc(1));
    }
    from_acc(sums.data(), gradient);
  };
  const Matrix<const acc> grad_first = w2_ ? Matrix<const acc>(layer.grad_hidden) : grad_t;  // of w1 ctx + b1
  linear_backward_weight(grad_first, context, gradients.w1);
  column_sums(grad_first, {}, gradients.b1);
  if (!w2_) return;
  column_sums(layer.grad_affine, layer.normalised, gradients.norm_weight, options_.norm_eps.has_value());
  column_sums(layer.grad_affine, {}, gradients.norm_bias, options_.norm_eps.has_value());
  linear_backward_weight(grad_t, layer.activated, gradients.w2);
  column_sums(grad_t, {}, gradients.b2);
}

// What x is multiplied with, from the values of a hard sigmoid's gate: clip(gate, 0, 1).
template <typename acc>
void clip_gate(Matrix<const acc> gates, Matrix<acc> scale) {
  for (int64_t n = 0; n < gates.rows; n++) {
    const acc* gate = gates.row(n);
    for (int64_t c = 0; c < gates.columns; c++)
      scale.row(n)[c] = gate[c] < acc(0) ? acc(0) : gate[c] > acc(1) ? acc(1) : gate[c];
  }
}

// Multiplies grad with gate'(t), from the values of the gate. The slope of the hard sigmoid is alpha at its corners, too.
template <typename acc>
void apply_gate_backward(const Options& options, Matrix<const acc> gates, Matrix<acc> grads) {
  const acc alpha = options.hard_gate ? static_cast<acc>(options.hard_gate->alpha) : acc(0);
  for (int64_t n = 0; n < gates.rows; n++) {
    const acc* gate = gates.row(n);
    acc* grad = grads.row(n);
    for (int64_t c = 0; c < gates.columns; c++) {
      if (!options.hard_gate) {
        grad[c] *= gate[c] * (acc(1) - gate[c]);
      } else {
        grad[c] = gate[c] >= acc(0) && gate[c] <= acc(1) ? grad[c] * alpha : acc(0);  // where it is flat not even a NaN passes
      }
    }
  }
}

}  // namespace gcnet_ext::cpu
