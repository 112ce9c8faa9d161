// What the kernels of attention pooling share (attention_pool.cuh): their parameters, the tiles of a block, and the merge of
// the blocks of a sample.
#pragma once

#include <algorithm>

#include "launch.h"
#include "online_softmax.cuh"
#include "reduce.cuh"
#include "shared_memory.cuh"
#include "transform.cuh"
#include "valid_positions.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PoolParams {
  using A = acc_t<T>;
  Map<const T> x;
  Extent extent;
  Parameter<T> weight, bias;  // w [C], b [1]; without a weight the pool averages
  A* context = nullptr;       // [N, C]
  A* attention = nullptr;     // [N, P]; holds the logits until the sample is merged; null where nobody needs it
  A* partial = nullptr;       // [N, splits, C + 2]: weighted, maximum and sum of every split
  // [N], zero before the launch: how many splits of each sample are done. It is null where no block of the pool merges them: a
  // later launch does (transform_split.cuh or attention_pool_merge.cuh), or the path `flat` leaves none.
  unsigned* arrived = nullptr;
  bool merged_later = false;     // whether transform_split.cuh merges the splits; the next launch may then start early
  int64_t first_sample = 0;      // of this launch
  unsigned splits = 0;           // of a sample
  TransformParams<T> transform;  // where transform.in_tail, the last block of a sample computes it
  Valid<T> valid;                // of the paths streamed, row_items, position_items and flat
};

// The tiles of a block, in the pool and in its backward pass, begin at begin, begin + step, ... below end.
struct SplitTiles {
  int64_t sample, begin, end, step;

  template <typename Params>
  __device__ SplitTiles(const Params& params, int tile_positions)
      : sample(params.first_sample + blockIdx.x / params.splits),
        begin(static_cast<int64_t>(blockIdx.x % params.splits) * tile_positions),
        end(params.extent.positions),
        step(static_cast<int64_t>(params.splits) * tile_positions) {}
};

// A block's part of the pool: its tiles, and where it leaves its results.
template <typename T>
struct PoolSplit : SplitTiles {
  acc_t<T>* partial;
  acc_t<T>* logits;

  __device__ PoolSplit(const PoolParams<T>& params, int tile_positions)
      : SplitTiles(params, tile_positions),
        partial(params.partial + (sample * params.splits + blockIdx.x % params.splits) * (params.extent.channels + 2)),
        logits(params.attention ? params.attention + sample * end : nullptr) {}
};

template <typename A>
struct MergeShared {
  unsigned* word;  // of last_to_arrive
  A* factor;       // [splits]: what the partial sums of each split are multiplied with

  __host__ __device__ MergeShared(auto& memory, int64_t splits) {
    memory.take(word, 1);
    memory.take(factor, splits);
  }
};

// The attention is exp(logit - reference) * inverse.
template <typename A>
struct MergedSoftmax {
  A reference, inverse;
};

// What merge_softmax() finds, one warp for a sample. It reads the maximum and the sum of split s at maximum[s * row] and
// maximum[s * row + 1].
template <typename A, int kSplitsPerLane>
struct SoftmaxMerge {
  MergedSoftmax<A> softmax;
  A exponentials[kSplitsPerLane];  // exp(maximum - reference) of the splits lane, lane + kWarp, ...
};

template <int kSplitsPerLane, typename A>
__device__ __forceinline__ SoftmaxMerge<A, kSplitsPerLane> merge_softmax(const A* maximum, int64_t row, unsigned splits) {
  A maxima[kSplitsPerLane], sums[kSplitsPerLane];
#pragma unroll
  for (int i = 0; i < kSplitsPerLane; i++) {
    const unsigned s = threadIdx.x % kWarp + i * kWarp;
    maxima[i] = s < splits ? load_fresh(maximum + s * row) : lowest<A>();
    sums[i] = s < splits ? load_fresh(maximum + s * row + 1) : A(0);
  }
  A largest = lowest<A>(), sum = A(0);
#pragma unroll
  for (int i = 0; i < kSplitsPerLane; i++) largest = larger(largest, maxima[i]);
  SoftmaxMerge<A, kSplitsPerLane> merge;
  merge.softmax.reference = softmax_reference(warp_max(largest));
#pragma unroll
  for (int i = 0; i < kSplitsPerLane; i++) {
    merge.exponentials[i] = exponential(maxima[i] - merge.softmax.reference);
    sum += sums[i] * merge.exponentials[i];
  }
  merge.softmax.inverse = A(1) / warp_sum(sum);
  return merge;
}

// All threads of a block call this when the partial sums of their split are written; the last block of a sample merges them.
// kValid: not all positions count. A position that does not count gets the attention 0. A sample in which none counts gets the
// context 0, although the softmax would be NaN there by its definition.
template <bool kValid = false, typename T>
__device__ void finish_split(const PoolParams<T>& params, const PoolSplit<T>& split) {
  using A = acc_t<T>;
  if (!params.arrived) return;
  const auto shared = shared_memory<MergeShared<A>>(params.splits);
  if (!last_to_arrive(params.arrived + split.sample, params.splits, shared.word)) return;

  const int64_t channels = params.extent.channels, row = channels + 2;
  const A* partial = params.partial + split.sample * params.splits * row;
  constexpr int kSplitsPerLane = kCudaMaxSplits / kWarp;
  const auto merge = merge_softmax<kSplitsPerLane>(partial + channels, row, params.splits);  // every warp reads all splits
  const A reference = merge.softmax.reference;
  const A inverse = kValid && params.valid.shares[split.sample] == A(0) ? A(0) : merge.softmax.inverse;
  if (threadIdx.x < kWarp) {
#pragma unroll
    for (int i = 0; i < kSplitsPerLane; i++) {
      if (const unsigned s = threadIdx.x + i * kWarp; s < params.splits) shared.factor[s] = merge.exponentials[i] * inverse;
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    A total = A(0);
    load_ahead<16>(
        0, params.splits, 1, [&](int64_t s) { return load_fresh(partial + s * row + c); },
        [&](int64_t s, A weighted) { total += weighted * shared.factor[s]; });
    params.context[split.sample * channels + c] = total;
  }
  if (split.logits) {
    load_ahead<8>(
        threadIdx.x, params.extent.positions, blockDim.x, [&](int64_t p) { return load_fresh(split.logits + p); },
        [&](int64_t p, A logit) {
          const bool counted = !kValid || params.valid.at(split.sample, p);
          split.logits[p] = counted ? exponential(logit - reference) * inverse : A(0);
        });
  }
  if (params.transform.in_tail) {
    __syncthreads();
    transform_sample(params.transform, split.sample);
  }
}

// The shared memory of finish_split and of the transform after it.
template <typename T>
size_t merge_shared_bytes(const PoolParams<T>& params) {
  using A = acc_t<T>;
  const size_t merge = shared_bytes<MergeShared<A>>(params.splits);
  if (!params.transform.in_tail) return merge;
  return std::max(merge, shared_bytes<TransformShared<A>>(params.transform.channels, params.transform.units));
}

// Launches a kernel of the pool, or of its backward pass, with a block for every split.
template <typename Kernel, typename Params, typename... Arguments>
void launch_splits(Kernel kernel, const Params& params, const CudaPoolPlan& plan, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  for_sample_ranges(params, params.splits, [&](const Params& range, dim3 grid) {
    launch(kernel, grid, dim3(plan.threads), shared, stream, range, arguments...);
  });
}

}  // namespace gcnet_ext::cuda
