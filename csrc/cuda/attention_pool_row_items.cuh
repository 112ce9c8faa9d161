// Attention pooling in NCHW by items (attention_pool.cuh, items.cuh): a tile of all channels stays in the registers of a block,
// so that x is read once, and the next tile is on its way while the block works on this one.
#pragma once

#include "attention_pool_split.cuh"
#include "items.cuh"
#include "row_tile.cuh"

namespace gcnet_ext::cuda {

template <typename T, typename Shape>
struct PoolRowItemsShared {
  using A = acc_t<T>;
  Vector<T, Shape::vector> stage[Shape::rows * Shape::threads];  // the next tile
  A weight[Shape::channels];
  A sums[Shape::warps * Shape::positions];  // over the channels of a warp
  A logits[Shape::positions];
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    attention_pool_row_items(PoolParams<T> params, ItemTiles tiles) {
  let_next_launch_start();
  using A = acc_t<T>;
  constexpr int V = Shape::vector;
  auto& shared = shared_memory<PoolRowItemsShared<T, Shape>>();
  const int channels = static_cast<int>(params.extent.channels), lane = threadIdx.x % kWarp;
  RowTile<T, Shape> tile;
  const auto inside = [&](const ItemTiles& at) { return at.first + tile.position() < at.end; };
  const auto copy = [&](const ItemTiles& at) {
    if (!at.there()) return;
    tile.copy_rows(shared.stage, params.x.at(at.sample(), 0, at.first), params.x.channel_stride, channels, inside(at));
  };
  tiles.begin(blockIdx.x);
  copy(tiles);
  for (int c = threadIdx.x; c < Shape::channels; c += Shape::threads)
    shared.weight[c] = c < channels ? params.weight.at(c) : A(0);
  const A bias = params.bias.at_or(0, A(0));
  __syncthreads();

  OnlineSoftmax<A> softmax;
  A weighted[Shape::groups] = {};
  while (tiles.there()) {
    const int64_t sample = tiles.sample(), first = tiles.first;
    tile.take_rows(shared.stage);
    if (params.valid.data && inside(tiles)) tile.keep_valid(params.valid.row(sample) + first + tile.position());
    const ItemTiles next = tiles.next();
    copy(next);
    tile.sum_over_channels(shared.weight, shared.sums);
    __syncthreads();
    if (const int p = threadIdx.x; p < Shape::positions) {
      A logit = bias;
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) logit += shared.sums[w * Shape::positions + p];
      const bool within = first + p < tiles.end, counts = within && params.valid.counts(sample, first + p);
      shared.logits[p] = counts ? logit : lowest<A>();
      if (within && params.attention) params.attention[sample * tiles.end + first + p] = logit;
    }
    __syncthreads();

    A maximum = lowest<A>(), sum = A(0);
    for (int p = lane; p < Shape::positions; p += kWarp) maximum = larger(maximum, shared.logits[p]);
    const A rescale = softmax.raise_maximum(warp_max(maximum)), reference = softmax.reference();
    for (int p = lane; p < Shape::positions; p += kWarp) sum += exponential(shared.logits[p] - reference);
    softmax.sum += warp_sum(sum);

    tile.hide();
    A exponentials[V];
#pragma unroll
    for (int j = 0; j < V; j++) exponentials[j] = exponential(shared.logits[tile.position() + j] - reference);
#pragma unroll
    for (int g = 0; g < Shape::groups; g++) weighted[g] = weighted[g] * rescale + tile.sum_over_positions(exponentials, g);

    if (tiles.last_of_item()) {
      A* const partial = params.partial + static_cast<int64_t>(tiles.item) * (channels + 2);
#pragma unroll
      for (int g = 0; g < Shape::groups; g++) {
        const int c = tile.owned_channel(g);
        if (c >= 0 && c < channels) partial[c] = weighted[g];
        weighted[g] = A(0);
      }
      if (threadIdx.x == 0) {
        partial[channels] = softmax.maximum;
        partial[channels + 1] = softmax.sum;
      }
      softmax = {};
    }
    tiles = next;
  }
}

// Calls body with the RowShape of a plan whose path is row_items.
template <typename T, typename Body>
void with_row_item_shape(const CudaPoolPlan& plan, const Body& body) {
  with_row_tile<kCudaRowItemTiles, kWidest<T>>(plan.tile, body, std::make_index_sequence<kCudaRowItemTiles.size()>());
}

template <typename T>
bool row_items_fit(const CudaPoolPlan& plan, int64_t samples) {
  bool fit = false;
  with_row_item_shape<T>(plan, [&](auto shape) {
    fit = items_fit(shared_bytes<PoolRowItemsShared<T, decltype(shape)>>(), samples * plan.splits);
  });
  return fit;
}

template <typename T>
void launch_attention_pool_row_items(const PoolParams<T>& params, const CudaPoolPlan& plan, cudaStream_t stream) {
  const ItemTiles tiles(params.extent.samples, params.extent.positions, plan.splits, plan.tile_positions);
  with_row_item_shape<T>(plan, [&](auto shape) {
    using Shape = decltype(shape);
    launch_items(attention_pool_row_items<T, Shape>, tiles.items, Shape::blocks, Shape::threads,
                 shared_bytes<PoolRowItemsShared<T, Shape>>(), /*early=*/false, stream, params, tiles);
  });
}

}  // namespace gcnet_ext::cuda
