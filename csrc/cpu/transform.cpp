#include "transform.h"

#include <cmath>

#include "parallel.h"

namespace gcnet_ext::cpu {
namespace {

constexpr int64_t kRowsPerItem = 16;      // rows of W that one item of work multiplies
constexpr int64_t kColumnsPerItem = 64;   // columns of W, where the sum runs over its rows
constexpr int64_t kRowsPerPartial = 256;  // rows of W that go into one partial sum

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// t -> sigmoid(t), or alpha t + beta for the hard sigmoid, in place.
template <typename acc>
void apply_gate(const Options& options, acc* t, int64_t count) {
  if (!options.hard_gate) return vector_kernels<acc>().sigmoid(t, count);
  const acc alpha = static_cast<acc>(options.hard_gate->alpha), beta = static_cast<acc>(options.hard_gate->beta);
  for (int64_t i = 0; i < count; i++) t[i] = alpha * t[i] + beta;
}

}  // namespace

template <typename acc>
BranchPass<acc>::BranchPass(const Branch& branch, const Options& options, int64_t samples, int64_t channels)
    : options_(options),
      samples_(samples),
      channels_(channels),
      units_(branch.units()),
      two_layers_(branch.w2),
      weight_bytes_(0),
      w1_(dense_weight<acc>(branch.w1)),
      w2_(dense_weight<acc>(branch.w2)),
      b1_(to_acc<acc>(branch.b1)),
      norm_weight_(to_acc<acc>(branch.norm_weight)),
      norm_bias_(to_acc<acc>(branch.norm_bias)),
      b2_(to_acc<acc>(branch.b2)) {
  for (const auto* weight : {&w1_, &w2_}) {
    if (*weight) weight_bytes_ += (*weight)->numel() * static_cast<int64_t>((*weight)->element_size());
  }
  if (two_layers_) activated_ = buffer<acc>(samples * units_);
}

template <typename acc>
void BranchPass<acc>::linear(const Tensor& weight, Matrix<const acc> x, const std::vector<acc>& bias, bool gated,
                             Matrix<acc> y) const {
  with_weight<acc>(weight, [&](auto* w) {
    const auto kernel = matrix_kernels<acc, std::remove_pointer_t<decltype(w)>>().linear;
    const auto some_rows = [&](int64_t m0, int64_t m1) {
      const Matrix<acc> part = y.some_columns(m0, m1);
      kernel(x, {w + m0 * x.columns, m1 - m0, x.columns, x.columns}, bias.empty() ? nullptr : bias.data() + m0, part);
      for (int64_t n = 0; gated && n < part.rows; n++) apply_gate(options_, part.row(n), part.columns);
    };
    if (!row_parallel()) return some_rows(0, y.columns);
    parallel_ranges(ceil_div(y.columns, kRowsPerItem), x.rows * y.columns * x.columns, [&](int64_t begin, int64_t end) {
      some_rows(begin * kRowsPerItem, std::min(y.columns, end * kRowsPerItem));
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
    const auto partial = buffer<acc>(partials * count * columns);
    parallel_for(partials * slices, count * rows * columns, [&](int64_t i) {
      const int64_t m0 = i / slices * kRowsPerPartial, m1 = std::min(rows, m0 + kRowsPerPartial);
      const int64_t k0 = i % slices * kColumnsPerItem, k1 = std::min(columns, k0 + kColumnsPerItem);
      const Matrix<acc> part{partial.get() + i / slices * count * columns, count, columns, columns};
      kernel(grad_y.some_columns(m0, m1), all.some_rows(m0, m1).some_columns(k0, k1), part.some_columns(k0, k1));
    });
    parallel_for(count, partials * count * columns, [&](int64_t n) {
      acc* total = grad_x.row(n);
      std::fill_n(total, columns, acc(0));
      for (int64_t part = 0; part < partials; part++) {
        const acc* values = partial.get() + (part * count + n) * columns;
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
      const int64_t m0 = i * kRowsPerItem, m1 = std::min(rows, m0 + kRowsPerItem);
      kernel(grad_y.some_columns(m0, m1), x, all.some_rows(m0, m1));
    });
  });
  if (widened) from_acc(data<acc>(target), gradient);
}

// The affine part of the norm, for hidden unit j.
template <typename acc>
acc BranchPass<acc>::affine(acc normalised, int64_t j) const {
  acc z = normalised;
  if (options_.norm_eps && !norm_weight_.empty()) z *= norm_weight_[j];
  if (options_.norm_eps && !norm_bias_.empty()) z += norm_bias_[j];
  return z;
}

// z = norm(hidden), activated = act(z), for one sample. Returns what the norm multiplies by.
template <typename acc>
acc BranchPass<acc>::activate(const acc* hidden, int64_t sample) {
  acc* activated = activated_.get() + sample * units_;
  acc mean = 0, inverse_std = 1;
  if (options_.norm_eps) {
    acc variance;
    vector_kernels<acc>().moments(hidden, units_, &mean, &variance);
    inverse_std = acc(1) / std::sqrt(variance + acc(*options_.norm_eps));
  }
  for (int64_t j = 0; j < units_; j++) {
    const acc normalised = (hidden[j] - mean) * inverse_std;
    if (normalised_) normalised_[sample * units_ + j] = normalised;
    activated[j] = affine(normalised, j);
  }
  vector_kernels<acc>().activation(options_.activation, static_cast<acc>(options_.slope), activated, units_);
  return inverse_std;
}

// grad_hidden from grad_activated for one sample; normalised_ and inverse_std are those of activate().
template <typename acc>
void BranchPass<acc>::activate_backward(const acc* grad_activated, acc inverse_std, int64_t sample) {
  const acc* normalised = normalised_.get() + sample * units_;
  acc* grad_normalised = grad_normalised_.get() + sample * units_;  // first dz, the gradient of the affine output
  acc* grad_hidden = grad_hidden_.get() + sample * units_;
  acc* z = grad_hidden;  // until the gradient takes its place
  for (int64_t j = 0; j < units_; j++) z[j] = affine(normalised[j], j);
  std::copy_n(grad_activated, units_, grad_normalised);
  vector_kernels<acc>().activation_gradient(options_.activation, static_cast<acc>(options_.slope), z, units_, grad_normalised);
  acc sum = 0, dot = 0;
  for (int64_t j = 0; j < units_; j++) {
    const acc scaled = options_.norm_eps && !norm_weight_.empty() ? grad_normalised[j] * norm_weight_[j] : grad_normalised[j];
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
void BranchPass<acc>::forward(const acc* context, int64_t first, int64_t count, acc* hidden, int64_t hidden_stride, bool gated,
                              acc* t) {
  const auto samples = [&](int64_t begin, int64_t n) {
    const Matrix<acc> h{hidden + begin * hidden_stride, n, units_, hidden_stride};
    linear(*w1_, {context + begin * channels_, n, channels_, channels_}, b1_, /*gated=*/false, h);
    if (!two_layers_) {
      for (int64_t i = begin; i < begin + n; i++) {
        std::copy_n(hidden + i * hidden_stride, channels_, t + i * channels_);
        if (gated) apply_gate(options_, t + i * channels_, channels_);
      }
      return;
    }
    for (int64_t i = 0; i < n; i++) activate(h.row(i), begin + i);
    linear(*w2_, {activated_.get() + begin * units_, n, units_, units_}, b2_, gated,
           {t + begin * channels_, n, channels_, channels_});
  };
  if (row_parallel()) return samples(first, count);
  parallel_for(count, count * channels_ * units_, [&](int64_t i) { samples(first + i, 1); });
}

template <typename acc>
void BranchPass<acc>::prepare_backward() {
  if (!two_layers_) return;
  for (auto* values : {&grad_hidden_, &grad_normalised_, &normalised_}) *values = buffer<acc>(samples_ * units_);
}

template <typename acc>
void BranchPass<acc>::backward(const acc* grad_t, const acc* hidden, int64_t hidden_stride, int64_t first, int64_t count,
                               acc* grad_context) {
  const auto samples = [&](int64_t begin, int64_t n) {
    const acc* grad_first = grad_t + begin * channels_;  // the gradient of w1 ctx + b1
    if (two_layers_) {
      const auto grad_activated = buffer<acc>(n * units_);
      linear_backward_input(*w2_, {grad_first, n, channels_, channels_}, {grad_activated.get(), n, units_, units_});
      for (int64_t i = 0; i < n; i++) {
        const acc inverse_std = activate(hidden + (begin + i) * hidden_stride, begin + i);
        activate_backward(grad_activated.get() + i * units_, inverse_std, begin + i);
      }
      grad_first = grad_hidden_.get() + begin * units_;
    }
    const auto grad_input = buffer<acc>(n * channels_);
    linear_backward_input(*w1_, {grad_first, n, units_, units_}, {grad_input.get(), n, channels_, channels_});
    for (int64_t i = 0; i < n * channels_; i++) grad_context[begin * channels_ + i] += grad_input[i];
  };
  if (row_parallel()) return samples(first, count);
  parallel_for(count, count * channels_ * units_, [&](int64_t i) { samples(first + i, 1); });
}

template <typename acc>
void BranchPass<acc>::parameter_gradients(const acc* grad_t, const acc* context, const PerWeight<Tensor>& gradients) const {
  const auto column_sums = [&](const acc* values, const acc* factors, int64_t columns, const Tensor& gradient,
                               bool used = true) {
    if (gradient.numel() == 0) return;
    std::vector<acc> sums(columns);
    for (int64_t n = 0; used && n < samples_; n++) {
      for (int64_t j = 0; j < columns; j++) sums[j] += values[n * columns + j] * (factors ? factors[n * columns + j] : acc(1));
    }
    from_acc(sums.data(), gradient);
  };
  const acc* grad_first = two_layers_ ? grad_hidden_.get() : grad_t;
  const auto matrix = [&](const acc* values, int64_t columns) { return Matrix<const acc>{values, samples_, columns, columns}; };
  linear_backward_weight(matrix(grad_first, units_), matrix(context, channels_), gradients.w1);
  column_sums(grad_first, nullptr, units_, gradients.b1);
  if (!two_layers_) return;
  column_sums(grad_normalised_.get(), normalised_.get(), units_, gradients.norm_weight, options_.norm_eps.has_value());
  column_sums(grad_normalised_.get(), nullptr, units_, gradients.norm_bias, options_.norm_eps.has_value());
  linear_backward_weight(matrix(grad_t, channels_), matrix(activated_.get(), units_), gradients.w2);
  column_sums(grad_t, nullptr, channels_, gradients.b2);
}

template <typename acc>
void clip_gate(const acc* gate, int64_t count, acc* scale) {
  for (int64_t i = 0; i < count; i++) scale[i] = gate[i] < acc(0) ? acc(0) : gate[i] > acc(1) ? acc(1) : gate[i];
}

template <typename acc>
void apply_gate_backward(const Options& options, const acc* gate, acc* grad, int64_t count) {
  const acc alpha = options.hard_gate ? static_cast<acc>(options.hard_gate->alpha) : acc(0);
  for (int64_t i = 0; i < count; i++) {
    if (!options.hard_gate) {
      grad[i] *= gate[i] * (acc(1) - gate[i]);
    } else {
      grad[i] = gate[i] >= acc(0) && gate[i] <= acc(1) ? grad[i] * alpha : acc(0);  // where it is flat not even a NaN passes
    }
  }
}

template class BranchPass<double>;
template class BranchPass<float>;
template void clip_gate(const double*, int64_t, double*);
template void clip_gate(const float*, int64_t, float*);
template void apply_gate_backward(const Options&, const double*, double*, int64_t);
template void apply_gate_backward(const Options&, const float*, float*, int64_t);

}  // namespace gcnet_ext::cpu
