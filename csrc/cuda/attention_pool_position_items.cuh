// Attention pooling in channels_last by items (attention_pool.cuh, items.cuh): a few positions stay in the registers of the warps
// that share their channels, so that x is read once, and the next tile is on its way while the block works on this one.
#pragma once

#include "items.cuh"
#include "position_group.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PoolPositionItemsShared : PoolPositionsShared<acc_t<T>> {
  Vector<T, kWidest<T>>* stage;  // [positions, threads]: the next tile

  __host__ __device__ PoolPositionItemsShared(auto& memory, int warps, int groups, int64_t channels)
      : PoolPositionsShared<acc_t<T>>(memory, warps, groups, channels) {
    memory.take(stage, kCudaPositionsPerWarp * kWarp * warps);
  }
};

template <typename T>
__global__ void __launch_bounds__(512, 1) attention_pool_position_items(PoolParams<T> params, ItemTiles tiles, int warps) {
  let_next_launch_start();
  using A = acc_t<T>;
  using Group = PositionGroup<T, kWidest<T>>;
  const int64_t channels = params.extent.channels;
  Group group(channels, warps);
  const auto shared = shared_memory<PoolPositionItemsShared<T>>(blockDim.x / kWarp, group.count(), channels);
  const auto copy = [&](const ItemTiles& at) {
    if (!at.there()) return;
    const int64_t first = at.first + group.first();
    const T* from = params.x.at(at.sample(), group.channel(), first);
#pragma unroll
    for (int i = 0; i < Group::positions; i++, from += params.x.position_stride)
      copy_later(shared.stage + i * blockDim.x + threadIdx.x, from, group.has_channels() & (first + i < at.end));
  };
  tiles.begin(blockIdx.x);
  copy(tiles);
  group.fetch_weight(params.weight);
  const A bias = params.bias.at_or(0, A(0));

  while (tiles.there()) {
    const int64_t sample = tiles.sample(), first = tiles.first + group.first();
    unsigned counts = ~0u;  // bit i tells of position i of the group
    if (params.valid.data) {
      const int64_t p = first + threadIdx.x % Group::positions;
      counts = __ballot_sync(kAllLanes, p < tiles.end && params.valid.at(sample, p));
    }
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < Group::positions; i++) group.values[i] = shared.stage[i * blockDim.x + threadIdx.x];
    group.hide();  // the values have arrived, so that the stage is free
    const ItemTiles next = tiles.next();
    copy(next);
    if (params.valid.data) {  // zeros take the place of values that may be NaN
#pragma unroll
      for (int i = 0; i < Group::positions; i++) {
        if (!(counts >> i & 1)) group.values[i] = {};
      }
    }
    const A logit = group.sum_over_channels(shared) + bias;
    const int64_t position = first + group.logit_position();
    if (params.attention && group.stores_logit() && position < tiles.end)
      params.attention[sample * tiles.end + position] = logit;
    group.add(position < tiles.end && counts >> group.logit_position() & 1 ? logit : lowest<A>());

    if (tiles.last_of_item()) {
      group.merge(shared, params.partial + static_cast<int64_t>(tiles.item) * (channels + 2));
      group.reset();
      __syncthreads();  // the next item may overwrite what this one has left in shared memory
    }
    tiles = next;
  }
}

template <typename T>
size_t position_items_shared_bytes(const Extent& extent, const PositionWarps& warps) {
  return shared_bytes<PoolPositionItemsShared<T>>(warps.all, warps.groups, extent.channels);
}

template <typename T>
bool position_items_fit(const CudaPoolPlan& plan, const Extent& extent) {
  return items_fit(position_items_shared_bytes<T>(extent, PositionWarps(extent, plan)), extent.samples * plan.splits);
}

template <typename T>
void launch_attention_pool_position_items(const PoolParams<T>& params, const CudaPoolPlan& plan, cudaStream_t stream) {
  const ItemTiles tiles(params.extent.samples, params.extent.positions, plan.splits, plan.tile_positions);
  const PositionWarps warps(params.extent, plan);
  const int blocks = 512 / plan.threads;  // per multiprocessor: this leaves a thread 128 registers
  launch_items(attention_pool_position_items<T>, tiles.items, blocks, plan.threads,
               position_items_shared_bytes<T>(params.extent, warps), /*early=*/false, stream, params, tiles, warps.of_group);
}

}  // namespace gcnet_ext::cuda
