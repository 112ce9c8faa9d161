// What every kernel of the package shares: the accumulation type, how a feature map and a parameter are passed, and how a block
// carves up its shared memory.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "compat.h"

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

// x in the accumulation type. A bfloat16 is the upper half of a float: said in so many words, it stays one instruction.
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

// A feature map [N, C, P] in memory (csrc/layout.h). Position or channel stride is 1; null data: the map is not there.
template <typename T>
struct Map {
  T* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0, position_stride = 0;

  __device__ int64_t offset(int64_t sample, int64_t channel, int64_t position) const {
    return sample * sample_stride + channel * channel_stride + position * position_stride;
  }
  __device__ T* at(int64_t sample, int64_t channel, int64_t position) const { return data + offset(sample, channel, position); }
};

// The sizes of a feature map and where its innermost dimension is.
struct Extent {
  int64_t samples = 0, channels = 0, positions = 0;
  bool channels_last = false;
};

// Which positions of each sample count in its pool; without data: all of them.
template <typename T>
struct Valid {
  const uint8_t* data = nullptr;
  int64_t sample_stride = 0;         // P, or 0 where all samples have the same
  const acc_t<T>* shares = nullptr;  // [N]: 1 / how many they are, 0 where there are none

  __device__ bool at(int64_t sample, int64_t position) const { return load(data + sample * sample_stride + position) != 0; }
};

// A parameter of x's dtype T or of float32. Which one is a run-time word, so that a kernel is compiled once per dtype of x.
template <typename T>
struct Parameter {
  const void* data = nullptr;
  bool single = false;  // float32

  Parameter() = default;
  Parameter(const void* data, bool single) : data(data), single(single) {}
  explicit Parameter(const acc_t<T>* data) : data(data), single(sizeof(acc_t<T>) == sizeof(float)) {}

  __device__ bool given() const { return data != nullptr; }
  __device__ acc_t<T> at(int64_t i) const {
    return single ? static_cast<acc_t<T>>(load(static_cast<const float*>(data) + i))
                  : static_cast<acc_t<T>>(load(static_cast<const T*>(data) + i));
  }
  __device__ acc_t<T> at_or(int64_t i, acc_t<T> otherwise) const { return given() ? at(i) : otherwise; }

  // values[j] = number i + j; all are loaded before the first is looked at.
  template <int V>
  __device__ void get(int64_t i, acc_t<T> (&values)[V]) const {
    const auto from = [&](const auto* start) {
      std::remove_cv_t<std::remove_pointer_t<decltype(start)>> loaded[V];
#pragma unroll
      for (int j = 0; j < V; j++) loaded[j] = load(start + i + j);
#pragma unroll
      for (int j = 0; j < V; j++) values[j] = static_cast<acc_t<T>>(loaded[j]);
    };
    if (single) {
      from(static_cast<const float*>(data));
    } else {
      from(static_cast<const T*>(data));
    }
  }
};

// The same to be written: the gradient of a parameter, in the dtype of the parameter.
template <typename T>
struct MutableParameter {
  void* data = nullptr;
  bool single = false;

  MutableParameter() = default;
  MutableParameter(void* data, bool single) : data(data), single(single) {}
  explicit MutableParameter(acc_t<T>* data) : data(data), single(sizeof(acc_t<T>) == sizeof(float)) {}

  __device__ bool wanted() const { return data != nullptr; }
  __device__ void put(int64_t i, acc_t<T> value) const {
    if (single) {
      store(static_cast<float*>(data) + i, static_cast<float>(value));
    } else {
      store(static_cast<T*>(data) + i, static_cast<T>(value));
    }
  }
};

// Hands out consecutive pieces of the block's shared memory.
class SharedMemory {
 public:
  __device__ SharedMemory() : next_(dynamic_shared_memory()) {}

  template <typename Value>
  __device__ Value* take(int64_t count) {
    Value* piece = reinterpret_cast<Value*>(next_);
    next_ += (count * sizeof(Value) + 15) / 16 * 16;
    return piece;
  }

 private:
  unsigned char* next_;
};

// What take<Value>(count) needs, for the host that sizes the block's shared memory.
template <typename Value>
constexpr size_t shared_bytes(int64_t count) {
  return (count * sizeof(Value) + 15) / 16 * 16;
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The larger of two numbers, or the one that is a number.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <typename A>
__device__ __forceinline__ A lowest() {
  return -static_cast<A>(INFINITY);
}

}  // namespace gcnet_ext::cuda
