// Attention pooling in channels_last (attention_pool.cuh): a block goes through the tiles of one split.
#pragma once

#include "position_group.cuh"

namespace gcnet_ext::cuda {

template <typename T, int V>
__global__ void __launch_bounds__(512, 1) attention_pool_positions(PoolParams<T> params, int warps) {
  using A = acc_t<T>;
  if (params.merged_later) let_next_launch_start();
  const int64_t channels = params.extent.channels;
  PositionGroup<T, V> group(channels, warps);
  const auto shared = shared_memory<PoolPositionsShared<A>>(blockDim.x / kWarp, group.count(), channels);

  const PoolSplit<T> split(params, group.count() * group.positions);
  const T* x = params.x.at(split.sample, group.channel(), 0);
  group.fetch_weight(params.weight);
  const A bias = params.bias.at_or(0, A(0));
  for (int64_t tile = split.begin; tile < split.end; tile += split.step) {
    const int64_t first = tile + group.first();
#pragma unroll
    for (int i = 0; i < group.positions; i++) {
      group.values[i] = {};
      if (group.has_channels() && first + i < split.end)
        group.values[i] = load_vector<V>(x + (first + i) * params.x.position_stride);
    }
    const A sum = group.sum_over_channels(shared);
    const int64_t position = first + group.logit_position();
    const A logit = position < split.end ? sum + bias : lowest<A>();
    if (split.logits && group.stores_logit() && position < split.end) split.logits[position] = logit;
    group.add(logit);
  }
  group.merge(shared, split.partial);
  finish_split(params, split);
}

template <typename T>
void launch_attention_pool_positions(const PoolParams<T>& params, const CudaPoolPlan& plan, cudaStream_t stream) {
  const PositionWarps warps(params.extent, plan);
  const size_t own = shared_bytes<PoolPositionsShared<acc_t<T>>>(warps.all, warps.groups, params.extent.channels);
  launch_splits(plan.vector == 1 ? attention_pool_positions<T, 1> : attention_pool_positions<T, kWidest<T>>, params, plan,
                std::max(own, merge_shared_bytes(params)), stream, warps.of_group);
}

}  // namespace gcnet_ext::cuda
