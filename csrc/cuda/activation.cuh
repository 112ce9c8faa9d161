// The activation of the transform and its gradient, as torch.nn.functional has them.
#pragma once

#include "../activation.h"
#include "numbers.cuh"

namespace gcnet_ext::cuda {

__device__ __forceinline__ float error_function(float x) { return erff(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }

template <typename A>
__device__ __forceinline__ A logistic(A x) {
  return A(1) / (A(1) + exponential(-x));
}

// Passes a NaN on.
template <typename A>
__device__ __forceinline__ A clip(A value, A least, A most) {
  return value < least ? least : value > most ? most : value;
}

// kReluOrSilu: the activation is one of these two, which most models use. Kernels for these two alone need fewer registers.
template <typename A>
struct ActivationFunction {
  Activation kind = Activation::relu;
  A slope = 0;  // of a LeakyReLU

  __host__ __device__ bool is_relu_or_silu() const { return kind == Activation::relu || kind == Activation::silu; }

  // act(z). A NaN is passed on.
  template <bool kReluOrSilu>
  __device__ __forceinline__ A value(A z) const {
    if constexpr (kReluOrSilu) return kind == Activation::silu ? z / (A(1) + exponential(-z)) : (z < A(0) ? A(0) : z);
    switch (kind) {
      case Activation::none: return z;
      case Activation::leaky_relu: return z > A(0) ? z : slope * z;
      case Activation::hardswish: return z * clip(z + A(3), A(0), A(6)) / A(6);
      case Activation::gelu: return z * normal_cdf(z);
      default: return z / (A(1) + exponential(-gate_argument(z)));
    }
  }

  // The gradient of z, grad act'(z).
  template <bool kReluOrSilu>
  __device__ __forceinline__ A backward(A z, A grad) const {
    if constexpr (kReluOrSilu) {
      if (kind == Activation::relu) return z <= A(0) ? A(0) : grad;
      const A sigmoid = logistic(z);
      return grad * sigmoid * (A(1) + z * (A(1) - sigmoid));
    }
    const A near = clip(z, A(-kFar), A(kFar));
    switch (kind) {
      case Activation::none: return grad;
      case Activation::leaky_relu: return z > A(0) ? grad : slope * grad;
      case Activation::hardswish: return z <= A(-3) ? A(0) : z >= A(3) ? grad : grad * (z / A(3) + A(0.5));
      case Activation::gelu: return grad * (normal_cdf(near) + near * exponential(A(-0.5) * near * near) * kNormalDensity);
      default: {
        const A gate = logistic(gate_argument(near));
        return grad * gate * (A(1) + near * gate_slope(near) * (A(1) - gate));
      }
    }
  }

 private:
  // For |z| > kFar a gradient has reached its limit. Up to kFar no term of it overflows.
  static constexpr int kFar = 100;
  static constexpr A kNormalDensity = 0.3989422804014327;  // its density at 0, 1 / sqrt(2 pi)

  // The cumulative distribution function of the standard normal distribution.
  __device__ static A normal_cdf(A z) { return A(0.5) * (A(1) + error_function(z * A(0.7071067811865476))); }

  // The GELU by tanh is z logistic(2 sqrt(2/pi) (z + 0.044715 z^3)).
  static constexpr A kGate = 1.5957691216057308, kCubic = 0.044715;
  __device__ static A gate_argument(A z) { return kGate * (z + kCubic * z * z * z); }
  __device__ static A gate_slope(A z) { return kGate * (A(1) + 3 * kCubic * z * z); }
};

}  // namespace gcnet_ext::cuda
