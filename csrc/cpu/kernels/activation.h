// The activations between the layers of a branch, and their derivatives, as torch.nn.functional has them.
//
//   silu       z s(z)                            s is the sigmoid
//   gelu       z F(z)                            F(z) = (1 + erf(z / sqrt(2))) / 2,  F'(z) = exp(-z^2 / 2) / sqrt(2 pi)
//   gelu_tanh  z s(2 u)                          u = sqrt(2 / pi) (z + 0.044715 z^3): s(2 u) is (1 + tanh(u)) / 2
//   hardswish  z clip(z + 3, 0, 6) / 6
//
// A NaN stays a NaN, because every comparison with it is false.
#pragma once

#include "simd.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

constexpr double kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588, kCubic = 0.044715;

template <typename acc>
inline Vec<acc> logistic(Vec<acc> z) {
  return acc(1) / (acc(1) + exp(-z));
}

// N. Juffa's two polynomials, at most 1.5 ulp: erf(x) = x + x p(x^2), and 1 - exp(q(|x|)) where |x| is above 0.93.
inline Vec<float> erf(Vec<float> x) {
  const Vec<float> t = x < 0.f ? -x : x, s = x * x;
  Vec<float> p = s * -5.96761703e-4f + 4.99119423e-3f;
  p = p * s - 2.67681349e-2f;
  p = p * s + 1.12819925e-1f;
  p = p * s - 3.76125336e-1f;
  p = p * s + 1.28379166e-1f;
  Vec<float> q = (t * -1.72853470e-5f + 3.83197126e-4f) * s + (t * -3.88396438e-3f + 2.42546219e-2f);
  q = q * t - 1.06777877e-1f;
  q = q * t - 6.34846687e-1f;
  q = q * t - 1.28717512e-1f;
  q = q * t - t;
  const Vec<float> far = 1.f - exp(q);
  return t > 0.927734375f ? (x < 0.f ? -far : far) : x * p + x;
}

inline Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::erf(x[i]);
  return x;
}

// normal() is F(z), and normal_density() is F'(z).
template <typename acc>
inline Vec<acc> normal(Vec<acc> z) {
  return acc(0.5) + acc(0.5) * erf(z * acc(kSqrtHalf));
}
template <typename acc>
inline Vec<acc> normal_density(Vec<acc> z) {
  return acc(0.5 * kSqrtTwoOverPi) * exp(acc(-0.5) * z * z);
}

// twice_u() is 2 u, and slope_of_twice_u() its derivative. Both are of a z within 16, because beyond that the sigmoid of 2 u is 0 or
// 1, and the cube of z could be infinite.
template <typename acc>
inline Vec<acc> within_16(Vec<acc> z) {
  const Vec<acc> low = z < acc(-16) ? broadcast(acc(-16)) : z;
  return low > acc(16) ? broadcast(acc(16)) : low;
}
template <typename acc>
inline Vec<acc> twice_u(Vec<acc> z) {
  return acc(2 * kSqrtTwoOverPi) * z * (acc(1) + acc(kCubic) * z * z);
}
template <typename acc>
inline Vec<acc> slope_of_twice_u(Vec<acc> z) {
  return acc(2 * kSqrtTwoOverPi) * (acc(1) + acc(3 * kCubic) * z * z);
}

// Calls body with the activation as a constant.
template <typename Body>
inline void with_activation(Activation activation, const Body& body) {
  const auto among = [&]<int64_t... i>(std::integer_sequence<int64_t, i...>) {
    ((static_cast<int64_t>(activation) == i ? body(std::integral_constant<Activation, Activation(i)>{}) : void()), ...);
  };
  among(std::make_integer_sequence<int64_t, static_cast<int64_t>(Activation::leaky_relu) + 1>{});
}

template <typename acc>
void activation(Activation chosen, acc slope, acc* values, int64_t count) {
  with_activation(chosen, [&](auto constant) {
    constexpr Activation kind = constant;
    if constexpr (kind == Activation::none) return;
    for_each_vector<acc>(count, [&](int64_t i, auto lanes) {
      const Vec<acc> z = load(values + i, lanes);
      Vec<acc> out = z;
      if constexpr (kind == Activation::relu) out = z < acc(0) ? Vec<acc>{} : z;
      if constexpr (kind == Activation::silu) out = z / (acc(1) + exp(-z));
      if constexpr (kind == Activation::gelu) out = z * normal<acc>(z);
      if constexpr (kind == Activation::gelu_tanh) out = z * logistic<acc>(twice_u<acc>(within_16<acc>(z)));
      if constexpr (kind == Activation::hardswish) {
        const Vec<acc> line = z + acc(3), low = line < acc(0) ? Vec<acc>{} : line;
        out = z * (low > acc(6) ? broadcast(acc(6)) : low) / acc(6);
      }
      if constexpr (kind == Activation::leaky_relu) out = z > acc(0) ? z : z * slope;
      store(values + i, out, lanes);
    });
  });
}

template <typename acc>
void activation_gradient(Activation chosen, acc slope, const acc* values, int64_t count, acc* gradient) {
  with_activation(chosen, [&](auto constant) {
    constexpr Activation kind = constant;
    if constexpr (kind == Activation::none) return;
    for_each_vector<acc>(count, [&](int64_t i, auto lanes) {
      const Vec<acc> z = load(values + i, lanes), grad = load(gradient + i, lanes);
      Vec<acc> out = grad;
      if constexpr (kind == Activation::relu) out = z <= acc(0) ? Vec<acc>{} : grad;
      if constexpr (kind == Activation::silu) {
        const Vec<acc> s = logistic<acc>(z);
        out = grad * s * (acc(1) + z * (acc(1) - s));
      }
      if constexpr (kind == Activation::gelu) out = grad * (normal<acc>(z) + z * normal_density<acc>(z));
      if constexpr (kind == Activation::gelu_tanh) {
        const Vec<acc> near = within_16<acc>(z), s = logistic<acc>(twice_u<acc>(near));
        out = grad * (s + near * s * (acc(1) - s) * slope_of_twice_u<acc>(near));
      }
      if constexpr (kind == Activation::hardswish) {
        const Vec<acc> inside = grad * (z / acc(3) + acc(0.5)), low = z <= acc(-3) ? Vec<acc>{} : inside;
        out = z >= acc(3) ? grad : low;
      }
      if constexpr (kind == Activation::leaky_relu) out = z > acc(0) ? grad : grad * slope;
      store(gradient + i, out, lanes);
    });
  });
}

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
