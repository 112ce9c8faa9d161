// Attention pooling of any shape (attention_pool.cuh), and over the positions that count alone: a tile is read twice, the
// second time from the caches.
#pragma once

#include "attention_pool_split.cuh"

namespace gcnet_ext::cuda {

template <typename A>
struct PoolStreamedShared {
  A sums[2 * kCudaStreamedThreads];  // of two tiles in turn: [warps, positions], over the channels of a warp
};

// Lane l has position l of the tile and its logit. `weighted` is kept in the partial sums, each channel by one thread.
// kValid: positions that do not count are skipped, as are those past the end.
template <typename T, bool kValid>
__global__ void __launch_bounds__(kCudaStreamedThreads, 2) attention_pool_streamed(PoolParams<T> params) {
  using A = acc_t<T>;
  if (params.merged_later) let_next_launch_start();
  constexpr int kWarps = kCudaStreamedThreads / kWarp, kUnroll = 8;
  static_assert(kCudaStreamedPositions == kWarp);
  auto& shared = shared_memory<PoolStreamedShared<A>>();
  const int64_t channels = params.extent.channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const PoolSplit<T> split(params, kWarp);
  const Map<const T> x{params.x.at(split.sample, 0, 0), 0, params.x.channel_stride, params.x.position_stride};
  const A bias = params.bias.at_or(0, A(0));
  const auto counts = [&](int64_t p) { return !kValid || params.valid.at(split.sample, p); };
  int turn = 0;
  OnlineSoftmax<A> softmax;
  for (int64_t first = split.begin; first < split.end; first += split.step, turn ^= 1) {
    const bool inside = first + lane < split.end, counted = inside && counts(first + lane);
    A* of_tile = shared.sums + turn * kWarps * kWarp;
    A logit = A(0);
    if (params.extent.channels_last) {
      constexpr int kPositions = kWarp / kWarps;  // per warp
      A sum[kPositions];
#pragma unroll
      for (int i = 0; i < kPositions; i++) sum[i] = A(0);
      for (int64_t c = lane; c < channels; c += kWarp) {
        const A weight = params.weight.at(c);
#pragma unroll
        for (int i = 0; i < kPositions; i++) {
          const int64_t p = first + warp * kPositions + i;
          if (p < split.end && counts(p)) sum[i] += weight * widen(load(x.at(0, c, p)));
        }
      }
      const Share share = transposed_sum<kPositions, 1, kWarp / 2>(sum, lane);
      if (share.owner) of_tile[warp * kPositions + share.first] = sum[0];
      __syncthreads();
      logit = of_tile[lane];
    } else {
#pragma unroll 8
      for (int64_t c = warp; c < channels; c += kWarps) {
        if (counted) logit += params.weight.at(c) * widen(load(x.at(0, c, first + lane)));
      }
      of_tile[threadIdx.x] = logit;
      __syncthreads();
      logit = A(0);
#pragma unroll
      for (int w = 0; w < kWarps; w++) logit += of_tile[w * kWarp + lane];
    }
    logit = counted ? logit + bias : lowest<A>();
    if (split.logits && warp == 0 && inside) split.logits[first + lane] = logit;
    const A rescale = softmax.raise_maximum(warp_max(logit)), exponent = exponential(logit - softmax.reference());
    softmax.sum += warp_sum(exponent);

    const auto accumulate = [&](int64_t c, A sum) {
      split.partial[c] = first == split.begin ? sum : split.partial[c] * rescale + sum;
    };
    if (params.extent.channels_last) {
      for (int64_t c0 = 0; c0 < channels; c0 += kCudaStreamedThreads) {
        const int64_t c = c0 + threadIdx.x;
        A sum = A(0);
#pragma unroll 8
        for (int i = 0; i < kWarp; i++) {
          const A of_position = __shfl_sync(kAllLanes, exponent, i);
          if (c < channels && first + i < split.end && counts(first + i))
            sum += of_position * widen(load(x.at(0, c, first + i)));
        }
        if (c < channels) accumulate(c, sum);
      }
    } else {
      for (int64_t c0 = warp; c0 < channels; c0 += kWarps * kUnroll) {
        A sum[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; i++) {
          const int64_t c = c0 + i * kWarps;
          sum[i] = counted && c < channels ? exponent * widen(load(x.at(0, c, first + lane))) : A(0);
        }
        const Share share = transposed_sum<kUnroll, 1, kWarp / 2>(sum, lane);
        const int64_t c = c0 + share.first * kWarps;
        if (share.owner && c < channels) accumulate(c, sum[0]);
      }
    }
  }
  if (threadIdx.x == 0) {
    split.partial[channels] = softmax.maximum;
    split.partial[channels + 1] = softmax.sum;
  }
  finish_split<kValid>(params, split);
}

template <typename T>
void launch_attention_pool_streamed(const PoolParams<T>& params, const CudaPoolPlan& plan, cudaStream_t stream) {
  const size_t shared = std::max(shared_bytes<PoolStreamedShared<acc_t<T>>>(), merge_shared_bytes(params));
  launch_splits(params.valid.data ? attention_pool_streamed<T, true> : attention_pool_streamed<T, false>, params, plan, shared,
                stream);
}

}  // namespace gcnet_ext::cuda
