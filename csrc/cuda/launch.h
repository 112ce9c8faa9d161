// What the host side of every kernel shares: from the maps of a call to the terms of plan_cuda.h, and grids that fit.
#pragma once

#include <algorithm>

#include "../plan_cuda.h"
#include "traits.cuh"

namespace gcnet_ext::cuda {

// What this thread has decided in the place of the plan functions (tuning.cu).
inline CudaTuning& tuning() {
  static thread_local CudaTuning decided{};
  return decided;
}

// Memory for one call, valid until its launches are done.
class Workspace {
 public:
  virtual ~Workspace() = default;

  template <typename Value>
  Value* take(int64_t count) {
    return static_cast<Value*>(allocate(std::max<int64_t>(count, 1) * sizeof(Value)));
  }
  unsigned* zeros(int64_t count, cudaStream_t stream) {
    unsigned* counters = take<unsigned>(count);
    if (count > 0) zero_async(counters, count * sizeof(unsigned), stream);
    return counters;
  }

 private:
  virtual void* allocate(size_t bytes) = 0;
};

inline CudaMap cuda_map(const Extent& extent, size_t element_size, bool is_aligned = false) {
  return {extent.channels, extent.positions, static_cast<int64_t>(element_size), extent.channels_last, is_aligned};
}

// A map that is not there is no obstacle.
template <typename T>
bool aligned(const CudaMap& map, const Map<T>& x) {
  return x.data == nullptr || cuda_aligned(map, x.data, x.sample_stride, x.channel_stride, x.position_stride);
}

// Both at once, for maps that are walked together.
template <typename T, typename... Maps>
CudaMap common_map(const Extent& extent, const Maps&... maps) {
  CudaMap map = cuda_map(extent, sizeof(T));
  map.aligned = (aligned(map, maps) && ...);
  return map;
}

// Calls body with the elements per access of a plan as a constant.
template <typename T, typename Body>
void with_vector(int vector, const Body& body) {
  if (vector == kWidest<T>) return body(std::integral_constant<int, kWidest<T>>{});
  if constexpr (sizeof(T) == 2) {
    if (vector == 4) return body(std::integral_constant<int, 4>{});
  }
  body(std::integral_constant<int, 1>{});
}

// Launches for as many samples at a time as a grid can hold.
template <typename Params, typename Launch>
void for_sample_ranges(Params params, int64_t blocks_per_sample, const Launch& launch_range) {
  const int64_t samples = params.extent.samples, most = std::max<int64_t>(1, kCudaMaxBlocks / blocks_per_sample);
  for (int64_t first = 0; first < samples; first += most) {
    params.first_sample = first;
    launch_range(params, dim3(static_cast<unsigned>(std::min(most, samples - first) * blocks_per_sample)));
  }
}

}  // namespace gcnet_ext::cuda
