// The backward pass of attention pooling in channels_last (attention_pool_backward.cuh): a few positions stay in the registers
// of the warps that share their channels, so that x is read once.
#pragma once

#include "attention_pool_backward_split.cuh"
#include "attention_pool_positions.cuh"

namespace gcnet_ext::cuda {

template <typename A>
struct PoolBackwardPositionsShared {
  A* sums;    // [2, warps, positions]: over the channels of a warp, for two tiles in turn
  A* dots;    // [warps]
  A* totals;  // [groups, channels]

  __host__ __device__ PoolBackwardPositionsShared(auto& memory, int warps, int groups, int64_t channels) {
    memory.take(sums, 2 * warps * kCudaPositionsPerWarp);
    memory.take(dots, warps);
    memory.take(totals, groups * channels);
  }
};

// Warp w of a group of `warps` has the channels (32*w + lane)*V, (32*w + lane)*V + 1, ... The groups work on different
// positions.
template <typename T, int V>
__global__ void __launch_bounds__(512, 1) attention_pool_backward_positions(PoolBackwardParams<T> params, int warps) {
  using A = acc_t<T>;
  if (params.next_is_early) let_next_launch_start();
  constexpr int kPositions = kCudaPositionsPerWarp, kTogether = kPositions / 2;  // accesses of g that are under way together
  constexpr int kLowest = kWarp / kPositions;  // lanes that differ in lower bits have the same position
  const int64_t channels = params.extent.channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, all_warps = blockDim.x / kWarp;
  const int group = warp / warps, groups = all_warps / warps;
  const auto shared = shared_memory<PoolBackwardPositionsShared<A>>(all_warps, groups, channels);

  const PoolBackwardSplit<T> split(params, groups * kPositions);
  const int64_t channel = static_cast<int64_t>(warp % warps * kWarp + lane) * V;
  const bool has_channels = channel < channels;
  const A dot = context_dot(params, split.sample, shared.dots);
  ChannelFactors<A> factors[V];
  A weight[V] = {}, grad_weight[V] = {}, grad_logit_sum = A(0);  // the sum is over this lane's positions
  if (has_channels) params.weight.get(channel, weight);
#pragma unroll
  for (int j = 0; j < V; j++) {
    factors[j] = {has_channels && split.scale ? split.scale[channel + j] : A(1),
                  has_channels ? split.grad_context[channel + j] : A(0), weight[j]};
  }
  int turn = 0;
  for (int64_t tile = split.begin; tile < split.end; tile += split.step) {
    const int64_t first = tile + group * kPositions;
    Vector<T, V> values[kPositions];
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      values[i] = {};
      if (has_channels && first + i < split.end) values[i] = load_vector<V>(params.x.at(split.sample, channel, first + i));
    }
    A sum[kPositions];
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      sum[i] = A(0);
#pragma unroll
      for (int j = 0; j < V; j++) sum[i] += factors[j].grad_context * widen(values[i].data[j]);
    }
    const Share share = transposed_sum<kPositions, 1, kWarp / 2>(sum, lane);  // this lane's position is share.first
    A u = sum[0];
    if (warps > 1) {
      A* of_tile = shared.sums + turn * all_warps * kPositions;
      turn ^= 1;
      if (share.owner) of_tile[warp * kPositions + share.first] = u;
      __syncthreads();
      u = A(0);
      for (int w = 0; w < warps; w++) u += of_tile[(group * warps + w) * kPositions + share.first];
    }
    const bool inside = first + share.first < split.end;
    const A attention = inside ? split.attention[first + share.first] : A(0);
    const A grad_logit = inside ? attention * (u - dot) : A(0);
    grad_logit_sum += grad_logit;
#pragma unroll
    for (int i = 0; i < kPositions; i++) hide_from_optimizer(values[i]);
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      const A of_position = __shfl_sync(kAllLanes, grad_logit, i * kLowest);
#pragma unroll
      for (int j = 0; j < V; j++) grad_weight[j] += of_position * widen(values[i].data[j]);
    }
    const bool has_grad = has_channels && params.grad.data, wanted = has_channels && params.grad_x.data;
#pragma unroll 1
    for (int i0 = 0; i0 < kPositions; i0 += kTogether) {
      Vector<T, V> result[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int64_t p = first + i0 + i;
        result[i] = {};
        if (has_grad && p < split.end) result[i] = load_vector<V>(params.grad.at(split.sample, channel, p));
      }
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int64_t p = first + i0 + i;
        const PositionFactors<A> at{__shfl_sync(kAllLanes, attention, (i0 + i) * kLowest),
                                    __shfl_sync(kAllLanes, grad_logit, (i0 + i) * kLowest)};
        hide_from_optimizer(result[i]);  // otherwise each is used before the next one is loaded
#pragma unroll
        for (int j = 0; j < V; j++) result[i].data[j] = static_cast<T>(factors[j].grad_x(widen(result[i].data[j]), at));
        if (wanted && p < split.end) store_vector(params.grad_x.at(split.sample, channel, p), result[i]);
      }
    }
  }
  if (!params.partial) return;
  A* const partial = split.partial(params, channels);
  const A* const context = params.context + split.sample * channels;
  const A sum = sum_over_lanes(grad_logit_sum, kLowest, kWarp / 2);
  if (has_channels) {
#pragma unroll
    for (int j = 0; j < V; j++) shared.totals[group * channels + channel + j] = grad_weight[j] - sum * context[channel + j];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    A total = A(0);
    for (int g = 0; g < groups; g++) total += shared.totals[g * channels + c];
    partial[c] = total;
  }
}

template <typename T>
void launch_attention_pool_backward_positions(const PoolBackwardParams<T>& params, const CudaPoolPlan& plan,
                                              cudaStream_t stream) {
  const PositionWarps warps(params.extent, plan);
  const size_t shared = shared_bytes<PoolBackwardPositionsShared<acc_t<T>>>(warps.all, warps.groups, params.extent.channels);
  launch_splits(plan.vector == 1 ? attention_pool_backward_positions<T, 1> : attention_pool_backward_positions<T, kWidest<T>>,
                params, plan, shared, stream, warps.of_group);
}

}  // namespace gcnet_ext::cuda
