// The Global Context block in double, forward and backward, written as in the paper: what the kernels are compared with.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernel_test.h"

namespace kernel_test {

using Values = std::vector<double>;

// The weights of a branch, or their gradients: w1 [H, C], w2 [C, H]. An absent one is empty.
struct BranchValues {
  Values w1, b1, norm_weight, norm_bias, w2, b2;
  int64_t units = 0;
};

// The names of the activations, by their number in the schema.
inline constexpr std::array<const char*, 7> kActivations{"none",      "relu",      "silu",      "gelu",
                                                         "gelu_tanh", "hardswish", "leaky_relu"};
inline constexpr double kSlope = 0.125;  // of the leaky ReLU

inline double activation(int kind, double z) {
  switch (kind) {
    case 0: return z;
    case 1: return std::max(z, 0.);
    case 2: return z / (1 + std::exp(-z));
    case 3: return z * std::erfc(-z / std::sqrt(2)) / 2;
    case 4: return z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z))) / 2;
    case 5: return z * std::clamp(z + 3, 0., 6.) / 6;
    default: return std::max(z, 0.) + kSlope * std::min(z, 0.);
  }
}

inline double activation_slope(int kind, double z) {
  const double root = std::sqrt(2 / M_PI);
  switch (kind) {
    case 0: return 1;
    case 1: return z > 0 ? 1 : 0;
    case 2: return (1 + z / (1 + std::exp(z))) / (1 + std::exp(-z));
    case 3: return std::erfc(-z / std::sqrt(2)) / 2 + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
    case 4: {
      const double tanh = std::tanh(root * (z + 0.044715 * z * z * z));
      return (1 + tanh) / 2 + z * (1 - tanh * tanh) * root * (1 + 3 * 0.044715 * z * z) / 2;
    }
    case 5: return std::fabs(z) < 3 ? z / 3 + 0.5 : z > 0 ? 1 : 0;
    default: return z > 0 ? 1 : kSlope;
  }
}

struct BlockOptions {
  bool norm = true, hard_sigmoid = false;
  int activation = 1;
  double eps = 1e-5, gate_alpha = 1. / 6, gate_beta = 0.5;
};

// x, residual, grad, out and the gradients of x and the residual are [N, C, P].
struct BlockReference {
  const int64_t N, C, P;
  BlockOptions options;
  Values x, mask_weight;  // without mask_weight: average pooling
  double mask_bias = 0;
  Values residual, valid;  // may be absent; valid [N, P] is 1 where a position counts in the pool
  bool final_relu = false;
  std::array<BranchValues, 2> branches;  // scale and shift

  Values context, attention, out;
  std::array<Values, 2> hidden, t;  // t of scale is the gate: that of a hard sigmoid before it is clipped
  Values grad_x, grad_residual, grad_mask_weight;
  std::array<BranchValues, 2> gradients;

  BlockReference(int64_t N, int64_t C, int64_t P) : N(N), C(C), P(P) {}

  static double at(const Values& values, int64_t i, double otherwise) { return values.empty() ? otherwise : values[i]; }

  bool counts(int64_t n, int64_t p) const { return at(valid, n * P + p, 1) != 0; }

  void pool() {
    context.assign(N * C, 0), attention.assign(N * P, 0);
    for (int64_t n = 0; n < N; n++) {
      double* m = &attention[n * P];
      double maximum = -INFINITY, sum = 0;
      for (int64_t p = 0; p < P; p++) {
        m[p] = mask_bias;
        for (int64_t c = 0; c < C && !mask_weight.empty(); c++) m[p] += mask_weight[c] * x[(n * C + c) * P + p];
        if (counts(n, p)) maximum = std::max(maximum, m[p]);
      }
      for (int64_t p = 0; p < P; p++) sum += m[p] = counts(n, p) ? std::exp(m[p] - maximum) : 0;
      for (int64_t p = 0; p < P; p++) {
        if (!counts(n, p)) continue;
        m[p] /= sum;
        for (int64_t c = 0; c < C; c++) context[n * C + c] += m[p] * x[(n * C + c) * P + p];
      }
    }
  }

  // The hidden units of a sample in the norm and the activation.
  struct Units {
    Values normalised, z, activated;
    double inverse_std = 1;
  };
  Units units_of(const BranchValues& weights, const double* h) const {
    const int64_t H = weights.units;
    Units units{Values(h, h + H), Values(H), Values(H)};
    if (options.norm) {
      double mean = 0, variance = 0;
      for (int64_t j = 0; j < H; j++) mean += h[j] / H;
      for (int64_t j = 0; j < H; j++) variance += (h[j] - mean) * (h[j] - mean) / H;
      units.inverse_std = 1 / std::sqrt(variance + options.eps);
      for (double& value : units.normalised) value = (value - mean) * units.inverse_std;
    }
    for (int64_t j = 0; j < H; j++) {
      const double z = options.norm ? units.normalised[j] * at(weights.norm_weight, j, 1) + at(weights.norm_bias, j, 0) : h[j];
      units.z[j] = z;
      units.activated[j] = activation(options.activation, z);
    }
    return units;
  }

  void transform(int b) {
    const BranchValues& weights = branches[b];
    const int64_t H = weights.units;
    hidden[b].assign(N * H, 0), t[b].assign(N * C, 0);
    for (int64_t n = 0; n < N; n++) {
      double *h = &hidden[b][n * H], *to = &t[b][n * C];
      for (int64_t j = 0; j < H; j++) {
        h[j] = at(weights.b1, j, 0);
        for (int64_t c = 0; c < C; c++) h[j] += weights.w1[j * C + c] * context[n * C + c];
      }
      if (weights.w2.empty()) {
        std::copy(h, h + H, to);
      } else {
        const Units units = units_of(weights, h);
        for (int64_t c = 0; c < C; c++) {
          to[c] = at(weights.b2, c, 0);
          for (int64_t j = 0; j < H; j++) to[c] += weights.w2[c * H + j] * units.activated[j];
        }
      }
      for (int64_t c = 0; c < C && b == 0; c++) {
        to[c] = options.hard_sigmoid ? options.gate_alpha * to[c] + options.gate_beta : 1 / (1 + std::exp(-to[c]));
      }
    }
  }

  // The scale of row i of x, of N*C rows.
  double scale(int64_t i) const { return t[0].empty() ? 1 : options.hard_sigmoid ? std::clamp(t[0][i], 0., 1.) : t[0][i]; }

  void forward() {
    pool();
    for (int b = 0; b < 2; b++) {
      if (branches[b].units) transform(b);
    }
    out = x;
    for (int64_t i = 0; i < N * C * P; i++) {
      out[i] = x[i] * scale(i / P) + at(t[1], i / P, 0) + at(residual, i, 0);
      if (final_relu && out[i] < 0) out[i] = 0;
    }
  }

  // Returns the gradient of a sample's hidden units from grad_t: back through w2, activation and norm.
  Values backward_hidden(int b, int64_t n, const double* grad_t) {
    const BranchValues& weights = branches[b];
    BranchValues& grads = gradients[b];
    const int64_t H = weights.units;
    if (weights.w2.empty()) return Values(grad_t, grad_t + H);
    const Units units = units_of(weights, &hidden[b][n * H]);
    Values grad(H, 0);
    for (int64_t c = 0; c < C; c++) {
      grads.b2[c] += grad_t[c];
      for (int64_t j = 0; j < H; j++) {
        grads.w2[c * H + j] += grad_t[c] * units.activated[j];
        grad[j] += weights.w2[c * H + j] * grad_t[c];
      }
    }
    double mean = 0, dot = 0;
    for (int64_t j = 0; j < H; j++) {
      grad[j] *= activation_slope(options.activation, units.z[j]);
      if (!options.norm) continue;
      grads.norm_weight[j] += grad[j] * units.normalised[j];
      grads.norm_bias[j] += grad[j];
      grad[j] *= at(weights.norm_weight, j, 1);
      mean += grad[j] / H;
      dot += grad[j] * units.normalised[j] / H;
    }
    for (int64_t j = 0; j < H && options.norm; j++) grad[j] = units.inverse_std * (grad[j] - mean - units.normalised[j] * dot);
    return grad;
  }

  void backward(Values grad) {
    for (int64_t i = 0; i < N * C * P; i++) {
      if (final_relu && out[i] <= 0) grad[i] = 0;
    }
    grad_residual = grad;
    for (int b = 0; b < 2; b++) {
      const int64_t H = branches[b].units;
      gradients[b] = {Values(H * C), Values(H), Values(H), Values(H), Values(H * C), Values(C), H};
    }
    grad_x.assign(N * C * P, 0), grad_mask_weight.assign(C, 0);
    for (int64_t n = 0; n < N; n++) {
      Values grad_context(C, 0);
      for (int b = 0; b < 2; b++) {
        const int64_t H = branches[b].units;
        if (H == 0) continue;
        Values grad_t(C, 0);
        for (int64_t c = 0; c < C; c++) {
          for (int64_t p = 0; p < P; p++) grad_t[c] += grad[(n * C + c) * P + p] * (b == 0 ? x[(n * C + c) * P + p] : 1);
          if (b == 1) continue;
          const double gate = t[0][n * C + c];
          const double slope = options.hard_sigmoid ? (gate >= 0 && gate <= 1 ? options.gate_alpha : 0) : gate * (1 - gate);
          grad_t[c] *= slope;
        }
        const Values grad_hidden = backward_hidden(b, n, grad_t.data());
        for (int64_t j = 0; j < H; j++) {
          gradients[b].b1[j] += grad_hidden[j];
          for (int64_t c = 0; c < C; c++) {
            gradients[b].w1[j * C + c] += grad_hidden[j] * context[n * C + c];
            grad_context[c] += branches[b].w1[j * C + c] * grad_hidden[j];
          }
        }
      }
      double dot = 0;
      for (int64_t c = 0; c < C; c++) dot += grad_context[c] * context[n * C + c];
      for (int64_t p = 0; p < P; p++) {
        if (!counts(n, p)) {
          for (int64_t c = 0; c < C; c++) grad_x[(n * C + c) * P + p] = grad[(n * C + c) * P + p] * scale(n * C + c);
          continue;
        }
        double u = 0;
        for (int64_t c = 0; c < C; c++) u += grad_context[c] * x[(n * C + c) * P + p];
        const double m = attention[n * P + p], grad_logit = mask_weight.empty() ? 0 : m * (u - dot);
        for (int64_t c = 0; c < C; c++) {
          const int64_t i = (n * C + c) * P + p;
          grad_x[i] = grad[i] * scale(n * C + c) + m * grad_context[c] + grad_logit * at(mask_weight, c, 0);
          grad_mask_weight[c] += grad_logit * (x[i] - context[n * C + c]);
        }
      }
    }
  }
};

template <class T>
Values values_of(const FeatureMap<T>& map) {
  Values values;
  for (int64_t n = 0; n < map.shape.samples; n++) {
    for (int64_t c = 0; c < map.shape.channels; c++) {
      for (int64_t p = 0; p < map.shape.positions; p++) values.push_back(map.at(n, c, p));
    }
  }
  return values;
}

// Errors are measured by the largest value, because the small ones are left over from sums of that size.
template <class Found>
void compare(const std::string& what, const Found& found, const Values& expected, double tolerance) {
  double size = 1e-30;
  for (const double value : expected) size = std::max(size, std::fabs(value));
  Comparison comparison(what, tolerance, size);
  for (size_t i = 0; i < expected.size(); i++) comparison.add(static_cast<double>(found[i]), expected[i]);
}

}  // namespace kernel_test
