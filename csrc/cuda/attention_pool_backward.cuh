// The backward pass of attention pooling, and of the fusion beside it. Given dctx = the gradient of the context and, in the
// whole block, g = the gradient of the output and s = what x was multiplied with (1 when absent):
//
//   u_p = dctx . x_p      dl_p = m_p (u_p - dctx . context)      dx_cp = g_cp s_c + m_p dctx_c + dl_p w_c
//   dw_c = sum_p dl_p (x_cp - context_c)
//
// with the attention m. Over a sample dl adds up to zero but for its rounding errors, which the context in dw keeps from being
// multiplied with what all x_cp have in common. Splits, tiles and the three ways through x are those of attention_pool.cuh; g
// and x are read once and dx is written once. Each split leaves its part of dw, for parameter_gradients.cuh to add up.
#pragma once

#include "../plan_cuda.h"
#include "row_tile.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PoolBackwardParams {
  using A = acc_t<T>;
  Map<const T> x, grad;  // grad without data: g = 0
  Map<T> grad_x;         // without data: not wanted
  Extent extent;
  Parameter<T> weight;              // w [C]
  const A* scale = nullptr;         // s [N, C], may be null
  const A* grad_context = nullptr;  // dctx [N, C]
  const A* context = nullptr;       // [N, C]
  const A* attention = nullptr;     // m [N, P]
  A* partial = nullptr;             // [N, splits, C] of dw; null: not wanted
  int64_t first_sample = 0;
  unsigned splits = 0;
  Valid<T> valid;  // for attention_pool_backward_streamed alone
};

// The part of the work that a block has: the tiles that begin at begin, begin + step, ... below end.
template <typename T>
struct PoolBackwardSplit {
  using A = acc_t<T>;
  int64_t sample, begin, end, step;
  const A *scale, *grad_context, *attention;

  __device__ PoolBackwardSplit(const PoolBackwardParams<T>& params, int tile_positions) {
    const unsigned split = blockIdx.x % params.splits;
    sample = params.first_sample + blockIdx.x / params.splits;
    begin = static_cast<int64_t>(split) * tile_positions;
    end = params.extent.positions;
    step = static_cast<int64_t>(params.splits) * tile_positions;
    const int64_t row = sample * params.extent.channels;
    scale = params.scale ? params.scale + row : nullptr;
    grad_context = params.grad_context + row;
    attention = params.attention + sample * end;
  }

  // What this block leaves of dw. It is found where it is used, for a pointer that is kept over the tiles takes registers.
  __device__ A* partial(const PoolBackwardParams<T>& params, int64_t channels) const {
    return params.partial + (sample * params.splits + blockIdx.x % params.splits) * channels;
  }
};

// dctx . context, by the whole block; of_warps is shared, with room for one sum per warp. Contains a barrier.
template <typename T>
__device__ __forceinline__ acc_t<T> context_dot(const PoolBackwardParams<T>& params, int64_t sample, acc_t<T>* of_warps) {
  using A = acc_t<T>;
  const int64_t channels = params.extent.channels, row = sample * channels;
  A sum = A(0);
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) sum += params.grad_context[row + c] * params.context[row + c];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  A total = A(0);
  for (unsigned w = 0; w < blockDim.x / kWarp; w++) total += of_warps[w];
  return total;
}

// What a position (m, dl) and a channel (s, dctx, w) contribute to dx.
template <typename A>
struct PositionFactors {
  A attention, grad_logit;
};
template <typename A>
struct ChannelFactors {
  A scale, grad_context, weight;

  __device__ A grad_x(A grad, const PositionFactors<A>& at) const {
    return multiply_add(grad, scale, multiply_add(at.attention, grad_context, at.grad_logit * weight));
  }
};

// ---- NCHW: a tile of all channels in the registers of the block -------------------------------------------------------------

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) attention_pool_backward_rows(PoolBackwardParams<T> params) {
  using A = acc_t<T>;
  constexpr int V = Shape::vector;
  // Accesses of g under way: no load moves up past a store. From sm_100 on the compiler finds no registers for more than four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int kTogether = std::min(Shape::rows, 4);
#else
  constexpr int kTogether = std::min(Shape::rows, 8);
#endif
  SharedMemory shared;
  A* weight = shared.take<A>(Shape::channels);
  A* grad_context = shared.take<A>(Shape::channels);
  A* scale = shared.take<A>(Shape::channels);
  A* sums = shared.take<A>(Shape::warps * Shape::positions);  // of the channels of every warp
  A* attention = shared.take<A>(Shape::positions);
  A* grad_logit = shared.take<A>(Shape::positions);
  A* grad_logit_sum = shared.take<A>(Shape::positions);  // over the tiles
  A* dots = shared.take<A>(Shape::warps);
  const int channels = static_cast<int>(params.extent.channels);
  const PoolBackwardSplit<T> split(params, Shape::positions);
  const T* x = params.x.at(split.sample, 0, 0);
  // What is not there or not wanted has no channels: a bound that is checked anyway, and no branch.
  const int grad_channels = params.grad.data ? channels : 0, grad_x_channels = params.grad_x.data ? channels : 0;
  RowTile<T, Shape> tile;
  const auto prefetch_tile = [&](const Map<const T>& map, int64_t first) {
    if (!map.data || first >= split.end) return;
    const bool inside = first + tile.position() < split.end;
    tile.prefetch_rows(map.at(split.sample, 0, first), map.channel_stride, channels, inside);
  };
  prefetch_tile(params.x, split.begin);
  for (int c = threadIdx.x; c < Shape::channels; c += Shape::threads) {
    weight[c] = c < channels ? params.weight.at(c) : A(0);
    grad_context[c] = c < channels ? split.grad_context[c] : A(0);
    scale[c] = c < channels && split.scale ? split.scale[c] : A(1);
  }
  if (threadIdx.x < Shape::positions) grad_logit_sum[threadIdx.x] = A(0);
  const A dot = context_dot(params, split.sample, dots);

  A grad_weight[Shape::groups];
#pragma unroll
  for (int g = 0; g < Shape::groups; g++) grad_weight[g] = A(0);
  for (int64_t first = split.begin; first < split.end; first += split.step) {
    const bool inside = first + tile.position() < split.end;
    tile.load_rows(x + first, params.x.channel_stride, channels, inside);
    prefetch_tile(params.grad, first);
    tile.sum_over_channels(grad_context, sums);
    __syncthreads();
    if (const int p = threadIdx.x; p < Shape::positions) {
      const bool needed = first + p < split.end;
      A u = A(0);
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) u += sums[w * Shape::positions + p];
      attention[p] = needed ? split.attention[first + p] : A(0);
      grad_logit[p] = needed ? attention[p] * (u - dot) : A(0);
      grad_logit_sum[p] += grad_logit[p];
    }
    __syncthreads();
    tile.hide();
    PositionFactors<A> at[V];
    A grad_logits[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      at[j] = {attention[tile.position() + j], grad_logit[tile.position() + j]};
      grad_logits[j] = at[j].grad_logit;
    }
#pragma unroll
    for (int g = 0; g < Shape::groups; g++) grad_weight[g] += tile.sum_over_positions(grad_logits, g);
    // Offsets that move from row to row: those that do not change from tile to tile would all be kept in registers.
    int64_t from = params.grad.offset(split.sample, tile.channel(0), first + tile.position());
    int64_t to = params.grad_x.offset(split.sample, tile.channel(0), first + tile.position());
#pragma unroll
    for (int i0 = 0; i0 < Shape::rows; i0 += kTogether) {
      Vector<T, V> values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; i++, from += Shape::step * params.grad.channel_stride) {
        const bool has_grad = inside & (tile.channel(i0 + i) < grad_channels);
        values[i] = {};
        if (has_grad) values[i] = load_vector<V>(params.grad.data + from);
      }
#pragma unroll
      for (int i = 0; i < kTogether; i++) hide_from_optimizer(values[i]);  // or each is used before the next is loaded
#pragma unroll
      for (int i = 0; i < kTogether; i++, to += Shape::step * params.grad_x.channel_stride) {
        const int c = tile.channel(i0 + i);
        const ChannelFactors<A> of_channel{scale[c], grad_context[c], weight[c]};
        const bool wanted = inside & (c < grad_x_channels);
#pragma unroll
        for (int j = 0; j < V; j++) values[i].data[j] = static_cast<T>(of_channel.grad_x(widen(values[i].data[j]), at[j]));
        if (wanted) store_vector(params.grad_x.data + to, values[i]);
      }
    }
    prefetch_tile(params.x, first + split.step);
  }
  if (!params.partial) return;
  A* const context = scale;  // whose numbers nobody needs any more: from global memory the context would cost registers
  __syncthreads();
  for (int c = threadIdx.x; c < channels; c += Shape::threads) context[c] = params.context[split.sample * channels + c];
  __syncthreads();
  A* const partial = split.partial(params, channels);
  A sum = A(0);
  for (int p = threadIdx.x % kWarp; p < Shape::positions; p += kWarp) sum += grad_logit_sum[p];
  sum = warp_sum(sum);
#pragma unroll
  for (int g = 0; g < Shape::groups; g++) {
    const int c = tile.owned_channel(g);
    if (c >= 0 && c < channels) partial[c] = grad_weight[g] - sum * context[c];
  }
}

// ---- channels_last: some positions in the registers of the warps that share their channels ----------------------------------

// Warp w of a group of `warps` has the channels (32*w + lane)*V ...; the groups of a block work on different positions.
template <typename T, int V>
__global__ void __launch_bounds__(512, 1) attention_pool_backward_positions(PoolBackwardParams<T> params, int warps) {
  using A = acc_t<T>;
  constexpr int kPositions = kCudaPositionsPerWarp, kTogether = kPositions / 2;  // accesses of g under way
  constexpr int kLowest = kWarp / kPositions;  // lanes that differ in lower bits have the same position
  const int64_t channels = params.extent.channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, all_warps = blockDim.x / kWarp;
  const int group = warp / warps, groups = all_warps / warps;
  SharedMemory shared;
  A* sums = shared.take<A>(2 * all_warps * kPositions);  // of the channels of every warp; two tiles in turn
  A* dots = shared.take<A>(all_warps);
  A* totals = shared.take<A>(groups * channels);

  const PoolBackwardSplit<T> split(params, groups * kPositions);
  const int64_t channel = static_cast<int64_t>(warp % warps * kWarp + lane) * V;
  const bool has_channels = channel < channels;
  const A dot = context_dot(params, split.sample, dots);
  ChannelFactors<A> factors[V];
  A weight[V] = {}, grad_weight[V] = {}, grad_logit_sum = A(0);  // the sum is of this lane's positions
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
      A* of_tile = sums + turn * all_warps * kPositions;
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
        hide_from_optimizer(result[i]);  // or each is used before the next is loaded
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
    for (int j = 0; j < V; j++) totals[group * channels + channel + j] = grad_weight[j] - sum * context[channel + j];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    A total = A(0);
    for (int g = 0; g < groups; g++) total += totals[g * channels + c];
    partial[c] = total;
  }
}

// ---- any shape: a tile is read twice, the second time from the caches -------------------------------------------------------

// Lane l has position l of the tile. Every channel's part of dw is kept by one thread. kValid: a position that does not
// count has dx = g s, and its x is not looked at.
template <typename T, bool kValid>
__global__ void __launch_bounds__(kCudaStreamedThreads, 2) attention_pool_backward_streamed(PoolBackwardParams<T> params) {
  using A = acc_t<T>;
  constexpr int kWarps = kCudaStreamedThreads / kWarp, kUnroll = 8;
  SharedMemory shared;
  A* sums = shared.take<A>(2 * kWarps * kWarp);  // two tiles in turn
  A* dots = shared.take<A>(kWarps);
  const int64_t channels = params.extent.channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const PoolBackwardSplit<T> split(params, kWarp);
  const A dot = context_dot(params, split.sample, dots);
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
    A* of_tile = sums + turn * kWarps * kWarp;
    A u = A(0);
    if (params.extent.channels_last) {
      constexpr int kPositions = kWarp / kWarps;  // of a warp
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

}  // namespace gcnet_ext::cuda
