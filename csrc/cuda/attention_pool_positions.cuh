// Attention pooling in channels_last (attention_pool.cuh): a few positions stay in the registers of the warps that share their
// channels, so that x is read once.
#pragma once

#include "attention_pool_split.cuh"

namespace gcnet_ext::cuda {

// The warps of a block: those of a group share the channels of a position, and the groups work on different positions.
struct PositionWarps {
  int all, of_group, groups;

  PositionWarps(const Extent& extent, const CudaPoolPlan& plan)
      : all(plan.threads / kWarp),
        of_group(static_cast<int>((extent.channels + kWarp * plan.vector - 1) / (kWarp * plan.vector))),
        groups(all / of_group) {}
};

template <typename A>
struct PoolPositionsShared {
  A* sums;       // [2, warps, positions]: over the channels of a warp, for two tiles in turn
  A* softmaxes;  // [groups, 2]: maximum and sum
  A* totals;     // [groups, channels]

  __host__ __device__ PoolPositionsShared(auto& memory, int warps, int groups, int64_t channels) {
    memory.take(sums, 2 * warps * kCudaPositionsPerWarp);
    memory.take(softmaxes, 2 * groups);
    memory.take(totals, groups * channels);
  }
};

// Warp w of a group of `warps` has the channels (32*w + lane)*V, (32*w + lane)*V + 1, ... The groups work on different
// positions.
template <typename T, int V>
__global__ void __launch_bounds__(512, 1) attention_pool_positions(PoolParams<T> params, int warps) {
  using A = acc_t<T>;
  if (params.merged_later) let_next_launch_start();
  constexpr int kPositions = kCudaPositionsPerWarp;
  const int64_t channels = params.extent.channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, all_warps = blockDim.x / kWarp;
  const int group = warp / warps, groups = all_warps / warps;
  const auto shared = shared_memory<PoolPositionsShared<A>>(all_warps, groups, channels);

  const PoolSplit<T> split(params, groups * kPositions);
  const int64_t channel = static_cast<int64_t>(warp % warps * kWarp + lane) * V;
  const T* x = params.x.at(split.sample, channel, 0);
  const A bias = params.bias.at_or(0, A(0));
  A weight[V] = {};
  if (channel < channels) params.weight.get(channel, weight);
  int turn = 0;
  A weighted[V] = {};
  OnlineSoftmax<A> softmax;
  for (int64_t tile = split.begin; tile < split.end; tile += split.step) {
    const int64_t first = tile + group * kPositions;
    Vector<T, V> values[kPositions];
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      values[i] = {};
      if (channel < channels && first + i < split.end) values[i] = load_vector<V>(x + (first + i) * params.x.position_stride);
    }

    A sum[kPositions];
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      sum[i] = A(0);
#pragma unroll
      for (int j = 0; j < V; j++) sum[i] += weight[j] * widen(values[i].data[j]);
    }
    const Share share = transposed_sum<kPositions, 1, kWarp / 2>(sum, lane);  // this lane's position is share.first
    A logit = sum[0];
    if (warps > 1) {
      A* of_tile = shared.sums + turn * all_warps * kPositions;
      turn ^= 1;
      if (share.owner) of_tile[warp * kPositions + share.first] = logit;
      __syncthreads();
      logit = A(0);
      for (int w = 0; w < warps; w++) logit += of_tile[(group * warps + w) * kPositions + share.first];
    }
    const int64_t position = first + share.first;
    logit = position < split.end ? logit + bias : lowest<A>();
    if (split.logits && warp % warps == 0 && share.owner && position < split.end) split.logits[position] = logit;

    constexpr int kLowest = kWarp / kPositions;  // lanes that differ in lower bits have the same position
    const A rescale = softmax.raise_maximum(max_over_lanes(logit, kLowest, kWarp / 2));
    const A exponent = exponential(logit - softmax.reference());
    softmax.sum += sum_over_lanes(exponent, kLowest, kWarp / 2);
#pragma unroll
    for (int i = 0; i < kPositions; i++) hide_from_optimizer(values[i]);
#pragma unroll
    for (int j = 0; j < V; j++) weighted[j] *= rescale;
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      const A of_position = __shfl_sync(kAllLanes, exponent, i * kLowest);
#pragma unroll
      for (int j = 0; j < V; j++) weighted[j] += of_position * widen(values[i].data[j]);
    }
  }

  if (channel < channels) {
#pragma unroll
    for (int j = 0; j < V; j++) shared.totals[group * channels + channel + j] = weighted[j];
  }
  if (warp % warps == 0 && lane == 0) {
    shared.softmaxes[2 * group] = softmax.maximum;
    shared.softmaxes[2 * group + 1] = softmax.sum;
  }
  __syncthreads();
  OnlineSoftmax<A> of_block;
  for (int g = 0; g < groups; g++) of_block.maximum = larger(of_block.maximum, shared.softmaxes[2 * g]);
  for (int g = 0; g < groups; g++)
    of_block.sum += shared.softmaxes[2 * g + 1] * exponential(shared.softmaxes[2 * g] - of_block.reference());
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    A total = A(0);
    for (int g = 0; g < groups; g++)
      total += shared.totals[g * channels + c] * exponential(shared.softmaxes[2 * g] - of_block.reference());
    split.partial[c] = total;
  }
  if (threadIdx.x == 0) {
    split.partial[channels] = of_block.maximum;
    split.partial[channels + 1] = of_block.sum;
  }
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
