// Plain loops over the elements, rows or samples of a map, for kernels without a plan of their own: those of the global response
// norm, and in the first engine those of a residual, a final ReLU and valid positions.
#pragma once

#include <algorithm>

#include "feature_map.cuh"
#include "launch.h"

namespace gcnet_ext::cuda {

constexpr int kElementThreads = 256;

// Calls body(i) for every i < count; the threads of a launch share the numbers i.
template <typename Body>
__device__ __forceinline__ void for_elements(int64_t count, const Body& body) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) body(i);
}

// Calls body(i, lane) for every i < count in all lanes of one warp; the warps of a launch share the numbers i.
template <typename Body>
__device__ __forceinline__ void for_warps(int64_t count, const Body& body) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  for (int64_t i = first; i < count; i += warps) body(i, threadIdx.x % kWarp);
}

// Elements are numbered as they lie in a dense map. A row is a channel of P positions, or in channels_last a position of C
// channels.
struct RowsOfSample {
  bool channels_last;
  int64_t rows, length;

  __host__ __device__ explicit RowsOfSample(const Extent& extent)
      : channels_last(extent.channels_last),
        rows(channels_last ? extent.positions : extent.channels),
        length(channels_last ? extent.channels : extent.positions) {}

  // The bits of a row, one for each element, begin with a byte of their own.
  __host__ __device__ int64_t bytes() const { return (length + 7) / 8; }
};

// The place of an element in a feature map, and the number of its bit.
struct Place {
  int64_t sample, channel, position, bit;

  __device__ Place(const RowsOfSample& rows, int64_t element) {
    const int64_t row = element / rows.length, column = element % rows.length;
    sample = row / rows.rows;
    channel = rows.channels_last ? column : row % rows.rows;
    position = rows.channels_last ? row % rows.rows : column;
    bit = row * rows.bytes() * 8 + column;
  }
  template <typename T>
  __device__ T* in(const Map<T>& map) const {
    return map.at(sample, channel, position);
  }
};

// Launches a kernel that goes through `count` elements, with a thread for each where the grid can hold them.
template <typename... Parameters, typename... Arguments>
void launch_elements(void (*kernel)(Parameters...), int64_t count, cudaStream_t stream, const Arguments&... arguments) {
  if (count == 0) return;
  const int64_t blocks = std::min((count + kElementThreads - 1) / kElementThreads, kCudaMaxBlocks);
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kElementThreads), 0, stream, arguments...);
}

}  // namespace gcnet_ext::cuda
