// A slice of the context of every sample of a block, in shared memory: as the pool has left it, or merged from its splits. The
// blocks that merge also share the attention.
#pragma once

#include "attention_pool_split.cuh"
#include "transform_split_work.cuh"

namespace gcnet_ext::cuda {

template <int kSamples>  // of a block, at most
struct ContextSlice {
  alignas(16) float context[kSamples * kSliceChannels];
  float factor[kSamples * kCudaMaxItemSplits];  // what the partial sums of each split are multiplied with
  MergedSoftmax<float> softmax[kSamples];
};

// shared.context = a slice of the context of every sample, and zeros behind it up to a whole vector.
template <int kSamples, typename T>
__device__ void load_context(const PoolParams<T>& params, const SplitPlace& place, int first_channel, int width,
                             ContextSlice<kSamples>& shared) {
  const int whole = whole_vectors(width);
  for (int i = threadIdx.x; i < place.samples * whole; i += kSplitThreads) {
    const int s = i / whole, c = i % whole;
    const float* context = params.context + (place.first_sample + s) * params.extent.channels + first_channel;
    shared.context[s * kSliceChannels + c] = c < width ? load_fresh(context + c) : 0.f;
  }
}

// shared.factor and shared.softmax of every sample, each by one warp.
template <int kSamples, typename T>
__device__ void find_factors(const PoolParams<T>& params, const SplitPlace& place, ContextSlice<kSamples>& shared) {
  const int64_t row = params.extent.channels + 2;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (warp >= place.samples) return;
  const int64_t sample = place.first_sample + warp;
  constexpr int kSplitsPerLane = kCudaMaxItemSplits / kWarp;
  const auto merge = merge_softmax<kSplitsPerLane>(params.partial + (sample * params.splits + 1) * row - 2, row, params.splits);
  MergedSoftmax<float> softmax = merge.softmax;
  if (params.valid.data && params.valid.shares[sample] == 0.f) softmax.inverse = 0.f;
#pragma unroll
  for (int i = 0; i < kSplitsPerLane; i++) {
    if (const unsigned s = lane + i * kWarp; s < params.splits)
      shared.factor[warp * kCudaMaxItemSplits + s] = merge.exponentials[i] * softmax.inverse;
  }
  if (lane == 0) shared.softmax[warp] = softmax;
}

// Merges the splits of a slice of the context; `stores`: this block writes it. The splits of a channel are shared by four
// lanes, and their sums are added up in pairs. A warp has 8 channels of kGroups groups and kSplits splits of them under way.
template <int kGroups, int kSplits, int kSamples, typename T>
__device__ __forceinline__ void merge_context(const PoolParams<T>& params, const SplitPlace& place, int first_channel,
                                              int width, bool stores, ContextSlice<kSamples>& shared) {
  constexpr int kShares = 4, kChannels = kWarp / kShares;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, share = lane / kChannels;
  const int splits = static_cast<int>(params.splits), stride = static_cast<int>(params.extent.channels) + 2;
  const int groups = split_tiles(width, kChannels), all = place.samples * groups;
  const float* const partial = params.partial + place.first_sample * splits * stride + first_channel;
  for (int first = warp * kGroups; first < all; first += kSplitWarps * kGroups) {
    float sum[kGroups] = {};
    for (int split = share; split < splits; split += kShares * kSplits) {
      float values[kGroups][kSplits];
#pragma unroll
      for (int i = 0; i < kGroups; i++) {
        const int s = (first + i) / groups, c = (first + i) % groups * kChannels + lane % kChannels;
#pragma unroll
        for (int u = 0; u < kSplits; u++) {
          values[i][u] = 0.f;
          const int at = split + u * kShares;
          if (first + i < all && c < width && at < splits) values[i][u] = load_fresh(partial + (s * splits + at) * stride + c);
        }
      }
#pragma unroll
      for (int i = 0; i < kGroups; i++) {
        const int of_sample = (first + i) / groups * static_cast<int>(kCudaMaxItemSplits);
#pragma unroll
        for (int u = 0; u < kSplits; u++) {
          const int at = split + u * kShares;
          if (first + i < all && at < splits) sum[i] += values[i][u] * shared.factor[of_sample + at];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      const float total = sum_over_lanes(sum[i], kChannels, kWarp / 2);
      const int s = (first + i) / groups, c = (first + i) % groups * kChannels + lane;
      if (share > 0 || first + i >= all || c >= kSliceChannels) continue;
      shared.context[s * kSliceChannels + c] = total;
      if (stores && c < width) params.context[(place.first_sample + s) * params.extent.channels + first_channel + c] = total;
    }
  }
}

// Merges the splits with as many loads under way as the work of the block gives each warp.
template <int kSamples, typename T>
__device__ __forceinline__ void merge_slice(const PoolParams<T>& params, const SplitPlace& place, int first_channel, int width,
                                            bool stores, ContextSlice<kSamples>& shared) {
  if constexpr (kSamples > 1) {
    if (place.samples * width > kSliceChannels) return merge_context<8, 2>(params, place, first_channel, width, stores, shared);
  }
  merge_context<2, 8>(params, place, first_channel, width, stores, shared);
}

// Turns this block's share of the logits into the attention.
template <int kSamples, typename T>
__device__ void write_attention(const PoolParams<T>& params, const SplitPlace& place, int64_t shares,
                                const ContextSlice<kSamples>& shared) {
  const int64_t positions = params.extent.positions, each = (positions + shares - 1) / shares, begin = place.share * each;
  const int64_t end = begin + each < positions ? begin + each : positions;
  for (int s = 0; s < place.samples; s++) {
    const int64_t sample = place.first_sample + s;
    const MergedSoftmax<float> softmax = shared.softmax[s];
    float* const attention = params.attention + sample * positions;
    load_ahead<8>(
        begin + threadIdx.x, end, kSplitThreads, [&](int64_t p) { return load_fresh(attention + p); },
        [&](int64_t p, float logit) {
          const bool counted = !params.valid.data || params.valid.at(sample, p);
          attention[p] = counted ? exponential(logit - softmax.reference) * softmax.inverse : 0.f;
        });
  }
}

}  // namespace gcnet_ext::cuda
