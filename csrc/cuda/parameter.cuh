// How a parameter of the block, or its gradient, is passed to a kernel.
#pragma once

#include "memory_access.h"
#include "numbers.cuh"

namespace gcnet_ext::cuda {

// A parameter of x's dtype T or of float32. Which one is decided at run time, so that a kernel is compiled once per dtype of x.
template <typename T>
struct Parameter {
  const void* data = nullptr;
  bool is_float32 = false;

  Parameter() = default;
  Parameter(const void* data, bool is_float32) : data(data), is_float32(is_float32) {}
  explicit Parameter(const acc_t<T>* data) : data(data), is_float32(sizeof(acc_t<T>) == sizeof(float)) {}

  __device__ bool present() const { return data != nullptr; }
  __device__ acc_t<T> at(int64_t i) const {
    return is_float32 ? static_cast<acc_t<T>>(load(static_cast<const float*>(data) + i))
                      : static_cast<acc_t<T>>(load(static_cast<const T*>(data) + i));
  }
  __device__ acc_t<T> at_or(int64_t i, acc_t<T> otherwise) const { return present() ? at(i) : otherwise; }

  // values[j] = number i + j. All loads are issued before the first value is used.
  template <int V>
  __device__ void get(int64_t i, acc_t<T> (&values)[V]) const {
    const auto from = [&](const auto* start) {
      std::remove_cv_t<std::remove_pointer_t<decltype(start)>> loaded[V];
#pragma unroll
      for (int j = 0; j < V; j++) loaded[j] = load(start + i + j);
#pragma unroll
      for (int j = 0; j < V; j++) values[j] = static_cast<acc_t<T>>(loaded[j]);
    };
    if (is_float32) {
      from(static_cast<const float*>(data));
    } else {
      from(static_cast<const T*>(data));
    }
  }

  // Element i in the accumulation dtype, where an earlier launch of the call may have written it.
  __device__ acc_t<T> fresh(int64_t i) const {
    return is_float32 ? static_cast<acc_t<T>>(load_fresh_vector<1>(static_cast<const float*>(data) + i).data[0])
                      : static_cast<acc_t<T>>(load_fresh_vector<1>(static_cast<const T*>(data) + i).data[0]);
  }
  // i is a multiple of V, and V elements of T take at least 16 bytes.
  template <int V>
  __device__ void get_fresh(int64_t i, acc_t<T> (&values)[V]) const {
    const auto from = [&](const auto* start) {
      using W = std::remove_cv_t<std::remove_pointer_t<decltype(start)>>;
      constexpr int kEach = 16 / sizeof(W);
      if (reinterpret_cast<uintptr_t>(data) % 16 == 0) {
        Vector<W, kEach> loaded[V / kEach];
#pragma unroll
        for (int k = 0; k < V / kEach; k++) loaded[k] = load_fresh_vector<kEach>(start + i + k * kEach);
#pragma unroll
        for (int j = 0; j < V; j++) values[j] = static_cast<acc_t<T>>(loaded[j / kEach].data[j % kEach]);
      } else {
#pragma unroll
        for (int j = 0; j < V; j++) values[j] = static_cast<acc_t<T>>(load_fresh_vector<1>(start + i + j).data[0]);
      }
    };
    if (is_float32) {
      from(static_cast<const float*>(data));
    } else {
      from(static_cast<const T*>(data));
    }
  }
};

// The gradient of a parameter, in the dtype of the parameter.
template <typename T>
struct MutableParameter {
  void* data = nullptr;
  bool is_float32 = false;

  MutableParameter() = default;
  MutableParameter(void* data, bool is_float32) : data(data), is_float32(is_float32) {}
  explicit MutableParameter(acc_t<T>* data) : data(data), is_float32(sizeof(acc_t<T>) == sizeof(float)) {}

  __device__ bool wanted() const { return data != nullptr; }
  __device__ void put(int64_t i, acc_t<T> value) const {
    if (is_float32) {
      store(static_cast<float*>(data) + i, static_cast<float>(value));
    } else {
      store(static_cast<T*>(data) + i, static_cast<T>(value));
    }
  }
};

}  // namespace gcnet_ext::cuda
