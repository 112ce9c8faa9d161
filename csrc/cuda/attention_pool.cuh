// Attention pooling of a feature map x [N, C, P]:
//
//   logit_p = w . x_p + b      m = softmax_p(logit)      context_c = sum_p m_p x_cp
//
// The positions of a sample are cut into tiles, which are dealt to the splits in turn, so that blocks that run together read
// neighbouring memory. A block has one split and goes through its tiles once, with a running softmax: `weighted`_c =
// sum_p exp(logit_p - maximum) x_cp of the tiles so far, multiplied with exp(old - new maximum) when a tile raises the maximum.
// The last block of a sample to finish merges the splits in their order, turns the logits into the attention, and goes on with
// the transform where its weights are small.
#pragma once

#include "../plan_cuda.h"
#include "row_tile.cuh"
#include "transform.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PoolParams {
  using A = acc_t<T>;
  Map<const T> x;
  Extent extent;
  Parameter<T> weight, bias;  // w [C], b [1]
  A* context;                 // [N, C]
  A* attention;               // [N, P]; holds the logits until the sample is merged; null: not wanted
  A* partial;                 // [N, splits, C + 2]: weighted, maximum and sum of every split
  unsigned* arrived;          // [N] zeros: the splits that are done
  int64_t first_sample;
  unsigned splits;
  TransformParams<T> transform;  // done by the last block where transform.in_tail
  Valid<T> valid;                // for attention_pool_streamed alone
};

// The part of the work that a block has: the tiles that begin at begin, begin + step, ... below end.
template <typename T>
struct PoolSplit {
  int64_t sample, begin, end, step;
  acc_t<T>* partial;
  acc_t<T>* logits;

  __device__ PoolSplit(const PoolParams<T>& params, int tile_positions) {
    const unsigned split = blockIdx.x % params.splits;
    sample = params.first_sample + blockIdx.x / params.splits;
    begin = static_cast<int64_t>(split) * tile_positions;
    end = params.extent.positions;
    step = static_cast<int64_t>(params.splits) * tile_positions;
    partial = params.partial + (sample * params.splits + split) * (params.extent.channels + 2);
    logits = params.attention ? params.attention + sample * end : nullptr;
  }
};

// Called by all threads of a block when its partial sums are written. kValid: not all positions count; the others get no
// attention, and a sample of which none does has no context, whatever the definition makes of that.
template <bool kValid = false, typename T>
__device__ void finish_split(const PoolParams<T>& params, const PoolSplit<T>& split) {
  using A = acc_t<T>;
  SharedMemory shared;
  unsigned* word = shared.take<unsigned>(1);
  A* factor = shared.take<A>(params.splits);  // what the partial sums are multiplied with
  if (!last_to_arrive(params.arrived + split.sample, params.splits, word)) return;

  const int64_t channels = params.extent.channels, row = channels + 2;
  const A* partial = params.partial + split.sample * params.splits * row;
  constexpr int kPerLane = kCudaMaxSplits / kWarp;  // splits, the same in every warp
  A maxima[kPerLane], sums[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const unsigned s = threadIdx.x % kWarp + i * kWarp;
    maxima[i] = s < params.splits ? load_fresh(partial + s * row + channels) : lowest<A>();
    sums[i] = s < params.splits ? load_fresh(partial + s * row + channels + 1) : A(0);
  }
  A maximum = lowest<A>(), sum = A(0);
#pragma unroll
  for (int i = 0; i < kPerLane; i++) maximum = larger(maximum, maxima[i]);
  const A reference = softmax_reference(warp_max(maximum));
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    maxima[i] = exponential(maxima[i] - reference);
    sum += sums[i] * maxima[i];
  }
  const A total_sum = warp_sum(sum);
  const A inverse = kValid && params.valid.shares[split.sample] == A(0) ? A(0) : A(1) / total_sum;
  if (threadIdx.x < kWarp) {
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      if (const unsigned s = threadIdx.x + i * kWarp; s < params.splits) factor[s] = maxima[i] * inverse;
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    A total = A(0);
    load_ahead<16>(
        0, params.splits, 1, [&](int64_t s) { return load_fresh(partial + s * row + c); },
        [&](int64_t s, A weighted) { total += weighted * factor[s]; });
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

// ---- NCHW: a tile of all channels in the registers of the block -------------------------------------------------------------

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) attention_pool_rows(PoolParams<T> params) {
  using A = acc_t<T>;
  constexpr int V = Shape::vector;
  SharedMemory shared;
  A* weight = shared.take<A>(Shape::channels);
  A* sums = shared.take<A>(Shape::warps * Shape::positions);  // of the channels of every warp
  A* logits = shared.take<A>(Shape::positions);
  const int channels = static_cast<int>(params.extent.channels), lane = threadIdx.x % kWarp;
  const PoolSplit<T> split(params, Shape::positions);
  const T* x = params.x.at(split.sample, 0, 0);
  RowTile<T, Shape> tile;
  const auto prefetch_tile = [&](int64_t first) {
    if (first >= split.end) return;
    tile.prefetch_rows(x + first, params.x.channel_stride, channels, first + tile.position() < split.end);
  };
  prefetch_tile(split.begin);
  const A bias = params.bias.at_or(0, A(0));
  for (int c = threadIdx.x; c < Shape::channels; c += Shape::threads) weight[c] = c < channels ? params.weight.at(c) : A(0);
  __syncthreads();

  OnlineSoftmax<A> softmax;
  A weighted[Shape::groups];
#pragma unroll
  for (int g = 0; g < Shape::groups; g++) weighted[g] = A(0);
  for (int64_t first = split.begin; first < split.end; first += split.step) {
    tile.load_rows(x + first, params.x.channel_stride, channels, first + tile.position() < split.end);
    prefetch_tile(first + split.step);
    tile.sum_over_channels(weight, sums);
    __syncthreads();
    if (const int p = threadIdx.x; p < Shape::positions) {
      A logit = bias;
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) logit += sums[w * Shape::positions + p];
      const bool inside = first + p < split.end;
      logits[p] = inside ? logit : lowest<A>();
      if (inside && split.logits) split.logits[first + p] = logit;
    }
    __syncthreads();

    A maximum = lowest<A>(), sum = A(0);
    for (int p = lane; p < Shape::positions; p += kWarp) maximum = larger(maximum, logits[p]);
    const A factor = softmax.raise(warp_max(maximum)), reference = softmax.reference();
    for (int p = lane; p < Shape::positions; p += kWarp) sum += exponential(logits[p] - reference);
    softmax.sum += warp_sum(sum);

    tile.hide();
    A exponentials[V];
#pragma unroll
    for (int j = 0; j < V; j++) exponentials[j] = exponential(logits[tile.position() + j] - reference);
#pragma unroll
    for (int g = 0; g < Shape::groups; g++) weighted[g] = weighted[g] * factor + tile.sum_over_positions(exponentials, g);
  }

#pragma unroll
  for (int g = 0; g < Shape::groups; g++) {
    const int c = tile.owned_channel(g);
    if (c >= 0 && c < channels) split.partial[c] = weighted[g];
  }
  if (threadIdx.x == 0) {
    split.partial[channels] = softmax.maximum;
    split.partial[channels + 1] = softmax.sum;
  }
  finish_split(params, split);
}

// ---- channels_last: some positions in the registers of the warps that share their channels ----------------------------------

// Warp w of a group of `warps` has the channels (32*w + lane)*V ...; the groups of a block work on different positions.
template <typename T, int V>
__global__ void __launch_bounds__(512, 1) attention_pool_positions(PoolParams<T> params, int warps) {
  using A = acc_t<T>;
  constexpr int kPositions = kCudaPositionsPerWarp;
  const int64_t channels = params.extent.channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, all_warps = blockDim.x / kWarp;
  const int group = warp / warps, groups = all_warps / warps;
  SharedMemory shared;
  A* sums = shared.take<A>(2 * all_warps * kPositions);  // of the channels of every warp; two tiles in turn
  A* softmaxes = shared.take<A>(2 * groups);             // maximum and sum of every group
  A* totals = shared.take<A>(groups * channels);

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
      A* of_tile = sums + turn * all_warps * kPositions;
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
    const A factor = softmax.raise(max_over_lanes(logit, kLowest, kWarp / 2));
    const A exponent = exponential(logit - softmax.reference());
    softmax.sum += sum_over_lanes(exponent, kLowest, kWarp / 2);
#pragma unroll
    for (int i = 0; i < kPositions; i++) hide_from_optimizer(values[i]);
#pragma unroll
    for (int j = 0; j < V; j++) weighted[j] *= factor;
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      const A of_position = __shfl_sync(kAllLanes, exponent, i * kLowest);
#pragma unroll
      for (int j = 0; j < V; j++) weighted[j] += of_position * widen(values[i].data[j]);
    }
  }

  if (channel < channels) {
#pragma unroll
    for (int j = 0; j < V; j++) totals[group * channels + channel + j] = weighted[j];
  }
  if (warp % warps == 0 && lane == 0) {
    softmaxes[2 * group] = softmax.maximum;
    softmaxes[2 * group + 1] = softmax.sum;
  }
  __syncthreads();
  OnlineSoftmax<A> of_block;
  for (int g = 0; g < groups; g++) of_block.maximum = larger(of_block.maximum, softmaxes[2 * g]);
  for (int g = 0; g < groups; g++) of_block.sum += softmaxes[2 * g + 1] * exponential(softmaxes[2 * g] - of_block.reference());
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    A total = A(0);
    for (int g = 0; g < groups; g++) total += totals[g * channels + c] * exponential(softmaxes[2 * g] - of_block.reference());
    split.partial[c] = total;
  }
  if (threadIdx.x == 0) {
    split.partial[channels] = of_block.maximum;
    split.partial[channels + 1] = of_block.sum;
  }
  finish_split(params, split);
}

// ---- any shape: a tile is read twice, the second time from the caches -------------------------------------------------------

// Lane l has position l of the tile and its logit. `weighted` is kept in the partial sums, each channel by one thread.
// kValid: positions that do not count are skipped, as those past the end are.
template <typename T, bool kValid>
__global__ void __launch_bounds__(kCudaStreamedThreads, 2) attention_pool_streamed(PoolParams<T> params) {
  using A = acc_t<T>;
  constexpr int kWarps = kCudaStreamedThreads / kWarp, kUnroll = 8;
  static_assert(kCudaStreamedPositions == kWarp);
  SharedMemory shared;
  A* sums = shared.take<A>(2 * kWarps * kWarp);  // two tiles in turn
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
    A* of_tile = sums + turn * kWarps * kWarp;
    A logit = A(0);
    if (params.extent.channels_last) {
      constexpr int kPositions = kWarp / kWarps;  // of a warp
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
    const A factor = softmax.raise(warp_max(logit)), exponent = exponential(logit - softmax.reference());
    softmax.sum += warp_sum(exponent);

    const auto accumulate = [&](int64_t c, A sum) {
      split.partial[c] = first == split.begin ? sum : split.partial[c] * factor + sum;
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

}  // namespace gcnet_ext::cuda
