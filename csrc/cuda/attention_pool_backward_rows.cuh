// The backward pass of attention pooling in NCHW (attention_pool_backward.cuh): a tile of all channels stays in the registers
// of a block, so that x is read once.
#pragma once

#include <algorithm>

#include "attention_pool_backward_split.cuh"
#include "row_tile.cuh"

namespace gcnet_ext::cuda {

// These are pointers because the compiler spends more registers on arrays here.
template <typename A, typename Shape>
struct PoolBackwardRowsShared {
  A *weight, *grad_context, *scale;  // [channels]
  A* sums;                           // [warps, positions]: over the channels of a warp
  A *attention, *grad_logit;         // [positions]
  A* grad_logit_sum;                 // [positions]: over the tiles
  A* dots;                           // [warps]

  __host__ __device__ explicit PoolBackwardRowsShared(auto& memory) {
    memory.take(weight, Shape::channels);
    memory.take(grad_context, Shape::channels);
    memory.take(scale, Shape::channels);
    memory.take(sums, Shape::warps * Shape::positions);
    memory.take(attention, Shape::positions);
    memory.take(grad_logit, Shape::positions);
    memory.take(grad_logit_sum, Shape::positions);
    memory.take(dots, Shape::warps);
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) attention_pool_backward_rows(PoolBackwardParams<T> params) {
  using A = acc_t<T>;
  if (params.next_is_early) let_next_launch_start();
  constexpr int V = Shape::vector;
  // The accesses of g that are under way together, because the compiler moves no load up past a store. From sm_100 on it finds
  // no registers for more than four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int kTogether = std::min(Shape::rows, 4);
#else
  constexpr int kTogether = std::min(Shape::rows, 8);
#endif
  const auto shared = shared_memory<PoolBackwardRowsShared<A, Shape>>();
  const int channels = static_cast<int>(params.extent.channels);
  const PoolBackwardSplit<T> split(params, Shape::positions);
  const T* x = params.x.at(split.sample, 0, 0);
  // An absent map counts as one without channels: a check of the channel is there in any case, and saves another one.
  const int grad_channels = params.grad.data ? channels : 0, grad_x_channels = params.grad_x.data ? channels : 0;
  RowTile<T, Shape> tile;
  const auto prefetch_tile = [&](const Map<const T>& map, int64_t first) {
    if (!map.data || first >= split.end) return;
    const bool inside = first + tile.position() < split.end;
    tile.prefetch_rows(map.at(split.sample, 0, first), map.channel_stride, channels, inside);
  };
  prefetch_tile(params.x, split.begin);
  for (int c = threadIdx.x; c < Shape::channels; c += Shape::threads) {
    shared.weight[c] = c < channels ? params.weight.at(c) : A(0);
    shared.grad_context[c] = c < channels ? split.grad_context[c] : A(0);
    shared.scale[c] = c < channels && split.scale ? split.scale[c] : A(1);
  }
  if (threadIdx.x < Shape::positions) shared.grad_logit_sum[threadIdx.x] = A(0);
  const A dot = context_dot(params, split.sample, shared.dots);

  A grad_weight[Shape::groups];
#pragma unroll
  for (int g = 0; g < Shape::groups; g++) grad_weight[g] = A(0);
  for (int64_t first = split.begin; first < split.end; first += split.step) {
    const bool inside = first + tile.position() < split.end;
    tile.load_rows(x + first, params.x.channel_stride, channels, inside);
    prefetch_tile(params.grad, first);
    tile.sum_over_channels(shared.grad_context, shared.sums);
    __syncthreads();
    if (const int p = threadIdx.x; p < Shape::positions) {
      const bool needed = first + p < split.end;
      A u = A(0);
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) u += shared.sums[w * Shape::positions + p];
      shared.attention[p] = needed ? split.attention[first + p] : A(0);
      shared.grad_logit[p] = needed ? shared.attention[p] * (u - dot) : A(0);
      shared.grad_logit_sum[p] += shared.grad_logit[p];
    }
    __syncthreads();
    tile.hide();
    PositionFactors<A> at[V];
    A grad_logits[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      at[j] = {shared.attention[tile.position() + j], shared.grad_logit[tile.position() + j]};
      grad_logits[j] = at[j].grad_logit;
    }
#pragma unroll
    for (int g = 0; g < Shape::groups; g++) grad_weight[g] += tile.sum_over_positions(grad_logits, g);
    // The offsets advance from row to row. If each row computed its own, the compiler would keep all of them in registers.
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
      for (int i = 0; i < kTogether; i++)
        hide_from_optimizer(values[i]);  // otherwise each is used before the next one is loaded
#pragma unroll
      for (int i = 0; i < kTogether; i++, to += Shape::step * params.grad_x.channel_stride) {
        const int c = tile.channel(i0 + i);
        const ChannelFactors<A> of_channel{shared.scale[c], shared.grad_context[c], shared.weight[c]};
        const bool wanted = inside & (c < grad_x_channels);
#pragma unroll
        for (int j = 0; j < V; j++) values[i].data[j] = static_cast<T>(of_channel.grad_x(widen(values[i].data[j]), at[j]));
        if (wanted) store_vector(params.grad_x.data + to, values[i]);
      }
    }
    prefetch_tile(params.x, first + split.step);
  }
  if (!params.partial) return;
  A* const context = shared.scale;  // s is not needed any more; read from global memory, the context would cost registers
  __syncthreads();
  for (int c = threadIdx.x; c < channels; c += Shape::threads) context[c] = params.context[split.sample * channels + c];
  __syncthreads();
  A* const partial = split.partial(params, channels);
  A sum = A(0);
  for (int p = threadIdx.x % kWarp; p < Shape::positions; p += kWarp) sum += shared.grad_logit_sum[p];
  sum = warp_sum(sum);
#pragma unroll
  for (int g = 0; g < Shape::groups; g++) {
    const int c = tile.owned_channel(g);
    if (c >= 0 && c < channels) partial[c] = grad_weight[g] - sum * context[c];
  }
}

template <typename T>
void launch_attention_pool_backward_rows(const PoolBackwardParams<T>& params, const CudaPoolPlan& plan, cudaStream_t stream) {
  with_row_shape<T>(plan, [&](auto shape) {
    using Shape = decltype(shape);
    launch_splits(attention_pool_backward_rows<T, Shape>, params, plan, shared_bytes<PoolBackwardRowsShared<acc_t<T>, Shape>>(),
                  stream);
  });
}

}  // namespace gcnet_ext::cuda
