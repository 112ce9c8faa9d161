// The backward pass of attention pooling of any shape (attention_pool_backward.cuh), and over the positions that count alone: a
// tile is read twice, the second time from the caches.
#pragma once

#include "attention_pool_backward_split.cuh"

namespace gcnet_ext::cuda {

template <typename A>
struct PoolBackwardStreamedShared {
  A sums[2 * kCudaStreamedThreads];  // of two tiles in turn: [warps, positions], over the channels of a warp
  A dots[kCudaStreamedThreads / kWarp];
};

// Lane l has position l of the tile. Every channel's part of dw is kept by one thread. kValid: a position that does not count
// has dx = g s, and its x is not read.
template <typename T, bool kValid>
__global__ void __launch_bounds__(kCudaStreamedThreads, 2) attention_pool_backward_streamed(PoolBackwardParams<T> params) {
  using A = acc_t<T>;
  if (params.next_is_early) let_next_launch_start();
  constexpr int kWarps = kCudaStreamedThreads / kWarp, kUnroll = 8;
  auto& shared = shared_memory<PoolBackwardStreamedShared<A>>();
  const int64_t channels = params.extent.channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const PoolBackwardSplit<T> split(params, kWarp);
  const A dot = context_dot(params, split.sample, shared.dots);
  const auto x_at = [&](int64_t c, int64_t p) { return widen(load(params.x.at(split.sample, c, p))); };
  const auto counts = [&](int64_t p) { return !kValid || params.valid.at(split.sample, p); };
  const auto put_grad_x = [&](int64_t c, int64_t p, const PositionFactors<A>& at) {
    if (!params.grad_x.data) return;
    const ChannelFactors<A> of_channel{split.scale ? split.scale[c] : A(1), split.grad_context[c], params.weight.at(c)};
    const A grad = params.grad.data ? widen(load(params.grad.at(split.sample, c, p))) : A(0);
    const A value = counts(p) ? of_channel.grad_x(grad, at) : grad * of_channel.scale;
    store(params.grad_x.at(split.sample, c, p), static_cast<T>(value));
  };
  int turn = 0;
  for (int64_t first = split.begin; first < split.end; first += split.step, turn ^= 1) {
    const bool inside = first + lane < split.end, counted = inside && counts(first + lane);
    A* of_tile = shared.sums + turn * kWarps * kWarp;
    A u = A(0);
    if (params.extent.channels_last) {
      constexpr int kPositions = kWarp / kWarps;  // per warp
      A sum[kPositions];
#pragma unroll
      for (int i = 0; i < kPositions; i++) sum[i] = A(0);
      for (int64_t c = lane; c < channels; c += kWarp) {
#pragma unroll
        for (int i = 0; i < kPositions; i++) {
          const int64_t p = first + warp * kPositions + i;
          if (p < split.end && counts(p)) sum[i] += split.grad_context[c] * x_at(c, p);
        }
      }
      const Share share = transposed_sum<kPositions, 1, kWarp / 2>(sum, lane);
      if (share.owner) of_tile[warp * kPositions + share.first] = sum[0];
      __syncthreads();
      u = of_tile[lane];
    } else {
#pragma unroll 8
      for (int64_t c = warp; c < channels; c += kWarps) {
        if (counted) u += split.grad_context[c] * x_at(c, first + lane);
      }
      of_tile[threadIdx.x] = u;
      __syncthreads();
      u = A(0);
#pragma unroll
      for (int w = 0; w < kWarps; w++) u += of_tile[w * kWarp + lane];
    }
    const A attention = counted ? split.attention[first + lane] : A(0);
    const PositionFactors<A> at{attention, counted ? attention * (u - dot) : A(0)};

    const A grad_logit_sum = warp_sum(at.grad_logit);
    const auto accumulate = [&](int64_t c, A sum) {
      if (!params.partial) return;
      A& total = split.partial(params, channels)[c];
      sum -= grad_logit_sum * params.context[split.sample * channels + c];
      total = first == split.begin ? sum : total + sum;
    };
    if (params.extent.channels_last) {
      for (int64_t c0 = 0; c0 < channels; c0 += kCudaStreamedThreads) {
        const int64_t c = c0 + threadIdx.x;
        A sum = A(0);
#pragma unroll 8
        for (int i = 0; i < kWarp; i++) {
          const PositionFactors<A> of_position{__shfl_sync(kAllLanes, at.attention, i),
                                               __shfl_sync(kAllLanes, at.grad_logit, i)};
          if (c >= channels || first + i >= split.end) continue;
          if (counts(first + i)) sum += of_position.grad_logit * x_at(c, first + i);
          put_grad_x(c, first + i, of_position);
        }
        if (c < channels) accumulate(c, sum);
      }
    } else {
      for (int64_t c0 = warp; c0 < channels; c0 += kWarps * kUnroll) {
        A sum[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; i++) {
          const int64_t c = c0 + i * kWarps;
          const bool needed = inside && c < channels;
          sum[i] = counted && c < channels ? at.grad_logit * x_at(c, first + lane) : A(0);
          if (needed) put_grad_x(c, first + lane, at);
        }
        const Share share = transposed_sum<kUnroll, 1, kWarp / 2>(sum, lane);
        const int64_t c = c0 + share.first * kWarps;
        if (share.owner && c < channels) accumulate(c, sum[0]);
      }
    }
  }
}

template <typename T>
void launch_attention_pool_backward_streamed(const PoolBackwardParams<T>& params, const CudaPoolPlan& plan,
                                             cudaStream_t stream) {
  launch_splits(params.valid.data ? attention_pool_backward_streamed<T, true> : attention_pool_backward_streamed<T, false>,
                params, plan, shared_bytes<PoolBackwardStreamedShared<acc_t<T>>>(), stream);
}

}  // namespace gcnet_ext::cuda
