// The backward pass of attention pooling in NCHW by items (attention_pool_backward.cuh, items.cuh): a tile of x stays in the
// registers of a block, and the same tile of g in shared memory until its rows are needed. The next tile of x is on its way while
// the block works on one, and so is each row of the next tile of g once that of this tile is used.
#pragma once

#include <algorithm>

#include "attention_pool_backward_split.cuh"
#include "items.cuh"
#include "row_tile.cuh"

namespace gcnet_ext::cuda {

template <typename T, typename Shape>
struct PoolBackwardRowItemsShared {
  using A = acc_t<T>;
  Vector<T, Shape::vector> x[Shape::rows * Shape::threads], grad[Shape::rows * Shape::threads];  // the next tile
  A weight[Shape::channels], grad_context[Shape::channels], scale[Shape::channels];
  A sums[Shape::warps * Shape::positions];  // over the channels of a warp
  A attention[Shape::positions], grad_logit[Shape::positions];
  A grad_logit_sum[Shape::positions];  // over the tiles of the item
  A dots[Shape::warps];
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    attention_pool_backward_row_items(PoolBackwardParams<T> params, ItemTiles tiles) {
  using A = acc_t<T>;
  constexpr int V = Shape::vector, kTogether = std::min(Shape::rows, 4);
  constexpr int kWords = std::max(1, Shape::rows * V / 32);  // of a bit for every element
  auto& shared = shared_memory<PoolBackwardRowItemsShared<T, Shape>>();
  const int channels = static_cast<int>(params.extent.channels);
  // Without grad_x, g is not needed. An absent map counts as one without channels, because a row's channel is checked anyway.
  const int grad_x_channels = params.grad_x.data ? channels : 0, grad_channels = params.grad.data ? grad_x_channels : 0;
  const int64_t bytes_of_bits = (tiles.end + 7) / 8;
  RowTile<T, Shape> tile;
  const auto inside = [&](const ItemTiles& at) { return at.there() && at.first + tile.position() < at.end; };
  const auto copy_x = [&](const ItemTiles& at) {
    if (!at.there()) return;
    tile.copy_rows(shared.x, params.x.at(at.sample(), 0, at.first), params.x.channel_stride, channels, inside(at));
  };
  tiles.begin(blockIdx.x);
  copy_x(tiles);
  const auto copy_first_grad = [&] {
    tile.copy_rows(shared.grad, params.grad.at(tiles.sample(), 0, tiles.first), params.grad.channel_stride, channels,
                   inside(tiles));
  };
  if (grad_channels > 0 && !params.grad_is_new) copy_first_grad();
  for (int c = threadIdx.x; c < Shape::channels; c += Shape::threads)
    shared.weight[c] = c < channels ? params.weight.at(c) : A(0);
  wait_for_previous_launch();
  // Not before that wait: the next launch reads results of the launch before this one, and does not wait for them.
  if (params.next_is_early) let_next_launch_start();
  if (grad_channels > 0 && params.grad_is_new) copy_first_grad();

  A grad_weight[Shape::groups] = {};
  while (tiles.there()) {
    const int64_t sample = tiles.sample(), first = tiles.first, position = first + threadIdx.x;
    const bool has_position = threadIdx.x < Shape::positions && position < tiles.end;
    const bool counts = has_position && params.valid.counts(sample, position);
    const A attention = counts ? params.attention[sample * tiles.end + position] : A(0);
    unsigned positive[kWords] = {};
    if (params.positive && inside(tiles)) {
      const int64_t p = first + tile.position();
#pragma unroll
      for (int i = 0; i < Shape::rows; i++) {
        const int c = tile.channel(i);
        if (c < channels) {
          const unsigned byte = load(params.positive + (sample * channels + c) * bytes_of_bits + p / 8);
          positive[i * V / 32] |= (byte >> p % 8 & ((1u << V) - 1)) << i * V % 32;
        }
      }
    }
    if (tiles.first_of_item()) {
      __syncthreads();  // no thread needs the vectors of the sample before any more
      A dot = A(0);
      for (int c = threadIdx.x; c < Shape::channels; c += Shape::threads) {
        const bool there = c < channels;
        const int64_t i = sample * channels + c;
        shared.grad_context[c] = there ? load_fresh(params.grad_context + i) : A(0);
        shared.scale[c] = there && params.scale ? load_fresh(params.scale + i) : A(1);
        if (there) dot += shared.grad_context[c] * params.context[i];
      }
      dot = warp_sum(dot);
      if (threadIdx.x % kWarp == 0) shared.dots[threadIdx.x / kWarp] = dot;
      if (threadIdx.x < Shape::positions) shared.grad_logit_sum[threadIdx.x] = A(0);
      __syncthreads();
    }
    tile.take_rows(shared.x);
    if (params.valid.data && inside(tiles)) tile.keep_valid(params.valid.row(sample) + first + tile.position());
    const ItemTiles next = tiles.next();
    copy_x(next);
    tile.sum_over_channels(shared.grad_context, shared.sums);
    __syncthreads();
    if (const int p = threadIdx.x; p < Shape::positions) {
      A u = A(0), dot = A(0);
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) u += shared.sums[w * Shape::positions + p];
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) dot += shared.dots[w];
      const A grad_logit = counts ? attention * (u - dot) : A(0);
      // An attention below zero marks a position that does not count.
      shared.attention[p] = counts || !has_position ? attention : A(-1);
      shared.grad_logit[p] = grad_logit;
      shared.grad_logit_sum[p] += grad_logit;
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

    const bool here = inside(tiles), next_here = inside(next);
    int64_t from = params.grad.offset(next.sample(), tile.channel(0), next.first + tile.position());
    int64_t to = params.grad_x.offset(sample, tile.channel(0), first + tile.position());
#pragma unroll
    for (int i0 = 0; i0 < Shape::rows; i0 += kTogether) {
      Vector<T, V> values[kTogether] = {};
      if (grad_channels > 0) {
#pragma unroll
        for (int i = 0; i < kTogether; i++) values[i] = shared.grad[(i0 + i) * Shape::threads + threadIdx.x];
#pragma unroll
        for (int i = 0; i < kTogether; i++) hide_from_optimizer(values[i]);  // the values have arrived
#pragma unroll
        for (int i = 0; i < kTogether; i++, from += Shape::step * params.grad.channel_stride) {
          copy_later(shared.grad + (i0 + i) * Shape::threads + threadIdx.x, params.grad.data + from,
                     next_here & (tile.channel(i0 + i) < grad_channels));
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; i++, to += Shape::step * params.grad_x.channel_stride) {
        const int c = tile.channel(i0 + i);
        const ChannelFactors<A> of_channel{shared.scale[c], shared.grad_context[c], shared.weight[c]};
        const bool wanted = here & (c < grad_x_channels);
#pragma unroll
        for (int j = 0; j < V; j++) {
          const int bit = (i0 + i) * V + j;
          A grad = widen(values[i].data[j]);
          if (params.positive) grad = positive[bit / 32] >> bit % 32 & 1 ? grad : A(0);
          values[i].data[j] = static_cast<T>(of_channel.grad_x(grad, at[j], !(at[j].attention < A(0))));
        }
        if (wanted) store_vector(params.grad_x.data + to, values[i]);
      }
    }

    if (params.partial && tiles.last_of_item()) {
      A* const partial = params.partial + static_cast<int64_t>(tiles.item) * channels;
      A sum = A(0);
      for (int p = threadIdx.x % kWarp; p < Shape::positions; p += kWarp) sum += shared.grad_logit_sum[p];
      sum = warp_sum(sum);
#pragma unroll
      for (int g = 0; g < Shape::groups; g++) {
        const int c = tile.owned_channel(g);
        if (c >= 0 && c < channels) partial[c] = grad_weight[g] - sum * params.context[sample * channels + c];
        grad_weight[g] = A(0);
      }
    }
    tiles = next;
  }
}

// Calls body with the RowShape of a plan of the backward pass whose path is row_items.
template <typename T, typename Body>
void with_row_backward_item_shape(const CudaPoolPlan& plan, const Body& body) {
  constexpr auto& tiles = kCudaRowBackwardItemTiles;
  with_row_tile<kCudaRowBackwardItemTiles, kWidest<T>>(plan.tile, body, std::make_index_sequence<tiles.size()>());
}

template <typename T>
bool backward_row_items_fit(const CudaPoolPlan& plan, int64_t samples) {
  bool fit = false;
  with_row_backward_item_shape<T>(plan, [&](auto shape) {
    fit = items_fit(shared_bytes<PoolBackwardRowItemsShared<T, decltype(shape)>>(), samples * plan.splits);
  });
  return fit;
}

template <typename T>
void launch_attention_pool_backward_row_items(const PoolBackwardParams<T>& params, const CudaPoolPlan& plan,
                                              cudaStream_t stream) {
  const ItemTiles tiles(params.extent.samples, params.extent.positions, plan.splits, plan.tile_positions);
  with_row_backward_item_shape<T>(plan, [&](auto shape) {
    using Shape = decltype(shape);
    launch_items(attention_pool_backward_row_items<T, Shape>, tiles.items, Shape::blocks, Shape::threads,
                 shared_bytes<PoolBackwardRowItemsShared<T, Shape>>(), params.early, stream, params, tiles);
  });
}

}  // namespace gcnet_ext::cuda
