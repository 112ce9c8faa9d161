// How a feature map [N, C, P] is passed to a kernel, and to the functions that plan its launch.
#pragma once

#include "../plan_cuda.h"
#include "memory_access.h"
#include "numbers.cuh"

namespace gcnet_ext::cuda {

// The sizes of a feature map and where its innermost dimension is.
struct Extent {
  int64_t samples = 0, channels = 0, positions = 0;
  bool channels_last = false;

  int64_t elements() const { return samples * channels * positions; }
};

// Where a feature map is in memory (csrc/layout.h): its channel or position stride is 1. An absent map has no data.
template <typename T>
struct Map {
  T* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0, position_stride = 0;

  __device__ int64_t offset(int64_t sample, int64_t channel, int64_t position) const {
    return sample * sample_stride + channel * channel_stride + position * position_stride;
  }
  __device__ T* at(int64_t sample, int64_t channel, int64_t position) const { return data + offset(sample, channel, position); }
};

// A map that is read after it was written.
template <typename T>
Map<const T> read_only(const Map<T>& map) {
  return {map.data, map.sample_stride, map.channel_stride, map.position_stride};
}

// One sample of a map as the plan functions see it.
inline CudaShape shape_of(const Extent& extent, size_t element_size) {
  return {extent.channels, extent.positions, static_cast<int64_t>(element_size), extent.channels_last, /*aligned=*/false};
}

// An absent map does not keep others from being read in wide accesses.
template <typename T>
bool aligned(const CudaShape& shape, const Map<T>& map) {
  return map.data == nullptr || cuda_aligned(shape, map.data, map.sample_stride, map.channel_stride, map.position_stride);
}

// The shape of maps that are walked together: it is aligned if all of them are.
template <typename T, typename... Maps>
CudaShape common_shape(const Extent& extent, const Maps&... maps) {
  CudaShape shape = shape_of(extent, sizeof(T));
  shape.aligned = (aligned(shape, maps) && ...);
  return shape;
}

}  // namespace gcnet_ext::cuda
