// The types that the kernels compute in, and arithmetic on them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda_or_emulator.h"

namespace gcnet_ext::cuda {

using c10::BFloat16;
using c10::Half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The type in which sums over x are taken: double for double, float for everything else.
template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulation<T>::type;

// x in the accumulation type. A bfloat16 is the upper half of a float: written as a shift, the conversion stays one
// instruction.
template <typename T>
__device__ __forceinline__ acc_t<T> widen(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(value.x) << 16);
  } else {
    return static_cast<acc_t<T>>(value);
  }
}

// Elements of T in the widest access, 16 bytes.
template <typename T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

// Calls body with the elements per access, which a plan has decided, as a constant.
template <typename T, typename Body>
void with_vector(int vector, const Body& body) {
  if (vector == kWidest<T>) return body(std::integral_constant<int, kWidest<T>>{});
  if constexpr (sizeof(T) == 2) {
    if (vector == 4) return body(std::integral_constant<int, 4>{});
  }
  body(std::integral_constant<int, 1>{});
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The larger of two numbers; if one of them is NaN, the other one.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <typename A>
__device__ __forceinline__ A lowest() {
  return -static_cast<A>(INFINITY);
}

}  // namespace gcnet_ext::cuda
