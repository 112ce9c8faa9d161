#include "plan_cuda.h"

#include <algorithm>

namespace gcnet_ext {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <size_t kCount>
int smallest_tile(const std::array<CudaRowTile, kCount>& tiles, int64_t channels) {
  for (size_t i = 0; i < kCount; i++) {
    if (channels <= tiles[i].channels) return static_cast<int>(i);
  }
  return -1;
}

void cut(CudaPoolPlan& plan, int64_t positions) {
  const int64_t tiles = ceil_div(positions, plan.tile_positions);
  plan.tiles_per_split = ceil_div(tiles, std::min(tiles, kCudaMaxSplits));
  plan.splits = ceil_div(tiles, plan.tiles_per_split);
}

}  // namespace

CudaPoolPlan plan_cuda_pool(const CudaMap& map) {
  CudaPoolPlan plan{CudaPoolPath::streamed, 1, -1, kCudaStreamedThreads, kCudaStreamedPositions, 0, 0};
  const int widest = map.aligned ? static_cast<int>(16 / map.element_size) : 1;
  if (map.element_size == 8) {
    // float64 is for checking gradients: one path is enough.
  } else if (map.channels_last) {
    // Warps that share the channels of a position, and groups of them that work on different positions.
    const int64_t warps = ceil_div(map.channels, 32 * widest);
    if (warps <= 16) {
      const int64_t groups = std::max<int64_t>(1, 8 / warps);
      plan.path = CudaPoolPath::positions;
      plan.vector = widest;
      plan.threads = static_cast<int>(groups * warps * 32);
      plan.tile_positions = groups * kCudaPositionsPerWarp;
    }
  } else {
    const int tile =
        map.aligned ? smallest_tile(kCudaRowTiles, map.channels) : smallest_tile(kCudaScalarRowTiles, map.channels);
    if (tile >= 0) {
      const CudaRowTile& shape = map.aligned ? kCudaRowTiles[tile] : kCudaScalarRowTiles[tile];
      plan.path = CudaPoolPath::rows;
      plan.vector = widest;
      plan.tile = tile;
      plan.threads = shape.threads;
      plan.tile_positions = static_cast<int64_t>(shape.lanes) * widest;
    }
  }
  cut(plan, map.positions);
  return plan;
}

bool cuda_aligned(const CudaMap& map, const void* address, int64_t sample_stride, int64_t channel_stride,
                  int64_t position_stride) {
  const int64_t inner = map.channels_last ? map.channels : map.positions;
  const int64_t outer_stride = map.channels_last ? position_stride : channel_stride;
  const int64_t bytes = (inner | outer_stride | sample_stride) * map.element_size;  // a common factor 2^k divides all or none
  return (bytes | static_cast<int64_t>(reinterpret_cast<uintptr_t>(address))) % 16 == 0;
}

bool plan_cuda_tail(int64_t channels, int64_t units, int64_t weight_bytes, int64_t accumulation_size) {
  constexpr int64_t kMostBytes = 256 << 10;  // one block reads them from the second-level cache in about 3 microseconds
  constexpr int64_t kScratch = 1024 + 64;    // values, padding included
  return weight_bytes <= kMostBytes &&
         (3 * channels + 2 * units + kScratch) * accumulation_size <= static_cast<int64_t>(kCudaSharedBytes);
}

CudaPositionGrid plan_cuda_positions(const CudaMap& map, int vector, int64_t most_splits) {
  constexpr int64_t kAccesses = 4 * kCudaSweepUnroll;  // of a thread, at least, where there are as many positions
  const int64_t vectors = ceil_div(map.channels, vector), lanes = std::min<int64_t>(vectors, kCudaSweepThreads);
  const int64_t positions = std::max<int64_t>(map.positions, 1), rows = kCudaSweepThreads / lanes;
  const int64_t pieces = std::min(ceil_div(positions, rows * kAccesses), most_splits);
  const int64_t split = ceil_div(ceil_div(positions, pieces), rows) * rows;
  return {static_cast<int>(lanes), static_cast<int>(rows), ceil_div(vectors, lanes), split, ceil_div(positions, split)};
}

int plan_cuda_row_lanes(const CudaMap& map, int vector) {
  int lanes = 1;
  while (lanes < kCudaSweepThreads && lanes * 2 * kCudaSweepUnroll * vector <= map.positions) lanes *= 2;
  return lanes;
}

}  // namespace gcnet_ext
