// Host side of channel_fuse.cuh and channel_sums.cuh. Shared by the torch glue and the emulator.
#pragma once

#include <algorithm>

#include "channel_fuse.cuh"
#include "channel_sums.cuh"
#include "launch.h"

namespace gcnet_ext::cuda {

// out = x*scale + shift. Everything but first_tile of the params is the caller's.
template <typename T>
void launch_channel_fuse(FuseParams<T> params, cudaStream_t stream) {
  const Extent& extent = params.extent;
  if (extent.samples == 0 || extent.positions == 0) return;
  const auto launch_tiles = [&](auto kernel, int64_t tiles, auto... arguments) {
    for (params.first_tile = 0; params.first_tile < tiles; params.first_tile += kCudaMaxBlocks) {
      const auto blocks = static_cast<unsigned>(std::min(tiles - params.first_tile, kCudaMaxBlocks));
      launch(kernel, dim3(blocks), dim3(kCudaSweepThreads), 0, stream, params, arguments...);
    }
  };
  constexpr int V = kWidest<T>;
  const CudaMap map = common_map<T>(extent, params.x, params.out);
  if (extent.channels_last) {
    const bool wide = cuda_vector(map) == V;
    const CudaPositionGrid grid = plan_cuda_positions(map, wide ? V : 1, extent.positions);
    const int64_t tiles = extent.samples * grid.splits * grid.channel_blocks;
    return wide ? launch_tiles(fuse_positions<T, V>, tiles, grid) : launch_tiles(fuse_positions<T, 1>, tiles, grid);
  }
  // One stretch of memory if x is dense, otherwise one per sample.
  if (extent.channels == 1) params.x.channel_stride = extent.positions;  // it was anything
  const int64_t plane = extent.channels * extent.positions;
  const bool rows_touch = !params.x.data || params.x.channel_stride == extent.positions;
  const bool dense = rows_touch && (!params.x.data || params.x.sample_stride == plane || extent.samples == 1);
  const int64_t segments = dense ? 1 : extent.samples, rows = dense ? extent.samples * extent.channels : extent.channels;
  const auto starts_aligned = [&](const auto* start, int64_t stride) {
    return reinterpret_cast<uintptr_t>(start) % 16 == 0 && (segments == 1 || stride % V == 0);
  };
  const bool wide = rows_touch && extent.positions >= V && starts_aligned(params.x.data, params.x.sample_stride) &&
                    starts_aligned(params.out.data, params.out.sample_stride);
  const int64_t tile = kCudaSweepThreads * kCudaSweepUnroll * (wide ? V : 1);
  const int64_t tiles = segments * ((rows * extent.positions + tile - 1) / tile);
  return wide ? launch_tiles(fuse_rows<T, V>, tiles, segments, rows) : launch_tiles(fuse_rows<T, 1>, tiles, segments, rows);
}

template <typename T>
size_t after_sums_shared_bytes(const SumsParams<T>& params) {
  using A = acc_t<T>;
  const int64_t channels = params.extent.channels;
  if (params.after == AfterSums::transform) return transform_shared_bytes<A>(channels, params.transform.units);
  if (params.after == AfterSums::nothing) return 0;
  return transform_backward_shared_bytes<A>(channels, params.transform_grad.forward.units);
}

// Everything but partial, first_sample and blocks_per_sample of the params is the caller's, arrived if it likes.
template <typename T>
void launch_channel_sums(SumsParams<T> params, Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  const Extent& extent = params.extent;
  const bool merges = extent.channels_last || params.after != AfterSums::nothing;
  if (!merges) params.arrived = nullptr;
  if (merges && !params.arrived) params.arrived = workspace.zeros(extent.samples, stream);
  const CudaMap map = common_map<T>(extent, params.a, params.b, params.fused);
  const int vector = cuda_vector(map);
  const auto with_products = [&](const auto& body) { params.b.data ? body(std::true_type{}) : body(std::false_type{}); };
  if (extent.channels_last) {
    const CudaPositionGrid grid = plan_cuda_positions(map, vector, plan_cuda_most_splits(tuning()));
    params.blocks_per_sample = static_cast<unsigned>(grid.splits * grid.channel_blocks);
    params.partial = workspace.take<A>(extent.samples * grid.splits * 2 * extent.channels);
    const size_t own = shared_bytes<unsigned>(1) + shared_bytes<A>(2 * static_cast<int64_t>(grid.rows) * grid.lanes * vector);
    const size_t shared = std::max(own, after_sums_shared_bytes(params));
    for_sample_ranges(params, params.blocks_per_sample, [&](const SumsParams<T>& range, dim3 blocks) {
      with_products([&](auto products) {
        launch(vector == 1 ? sums_positions<T, 1, products> : sums_positions<T, kWidest<T>, products>, blocks,
               dim3(kCudaSweepThreads), shared, stream, range, grid);
      });
    });
    return;
  }
  const int lanes = plan_cuda_row_lanes(map, vector, tuning()), rows = kCudaSweepThreads / lanes;
  params.blocks_per_sample = static_cast<unsigned>((extent.channels + rows - 1) / rows);
  const size_t own = shared_bytes<unsigned>(1) + shared_bytes<A>(2 * kCudaSweepThreads / kWarp);
  const size_t shared = std::max(own, after_sums_shared_bytes(params));
  for_sample_ranges(params, params.blocks_per_sample, [&](const SumsParams<T>& range, dim3 blocks) {
    with_products([&](auto products) {
      with_vector<T>(vector, [&](auto v) {
        launch(sums_rows<T, v, products>, blocks, dim3(kCudaSweepThreads), shared, stream, range, lanes);
      });
    });
  });
}

}  // namespace gcnet_ext::cuda
