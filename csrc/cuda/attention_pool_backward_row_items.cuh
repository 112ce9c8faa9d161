// The backward pass of attention pooling in NCHW by items (attention_pool_backward.cuh, items.cuh): a tile of x stays in the
// registers of a block, and the same tile of g in shared memory until its rows are needed. The next tile of x is on its way while
// the block works on one, and so is each row of the next tile of g once that of this tile is used.
#pragma once

#include <algorithm>

#include "attention_pool_backward_split.cuh"
#include "items.cuh"
#include "row_tile.cuh"

namespace gcnet_ext::cuda {

// What a block needs beside the maps while it works on a tile. kCluster: the blocks that share it (row_tile.cuh). Their sums over
// the channels have two places, for two tiles in turn, because one block may begin with a tile while another one still reads the
// sums of the tile before.
template <typename T, typename Shape, int kCluster = 1>
struct PoolBackwardTileShared {
  using A = acc_t<T>;
  A grad_context[Shape::channels], scale[Shape::channels];
  A sums[std::min(kCluster, 2)][Shape::warps * Shape::positions];  // over the channels of a warp
  A attention[Shape::positions], grad_logit[Shape::positions];
  A grad_logit_sum[Shape::positions];  // over the tiles of the item
  A dots[Shape::warps];
};

// The work on a tile. kOnce: nobody needs the maps again in this launch, and the accesses tell the caches so. Without it the
// caches decide by themselves.
template <typename T, typename Shape, int kCluster = 1, bool kOnce = false>
class PoolBackwardRows {
  using A = acc_t<T>;
  static constexpr int V = Shape::vector, kThreads = Shape::threads / kCluster, kTogether = std::min(Shape::rows, 4);
  static constexpr int kWords = std::max(1, Shape::rows* V / 32);  // of a bit for every element

 public:
  using Stage = Vector<T, V>;

  // x_stage and grad_stage [rows][threads of the block] and weight [channels] are in shared memory. `tiles`: any of the launch.
  __device__ PoolBackwardRows(const PoolBackwardParams<T>& params, const ItemTiles& tiles, Stage* x_stage, Stage* grad_stage,
                              const A* weight, PoolBackwardTileShared<T, Shape, kCluster>& shared)
      : params_(params),
        x_stage_(x_stage),
        grad_stage_(grad_stage),
        weight_(weight),
        shared_(shared),
        channels_(static_cast<int>(params.extent.channels)),
        bytes_of_bits_((tiles.end + 7) / 8) {}

  __device__ static void load_weight(const PoolBackwardParams<T>& params, A* weight) {
    for (int c = threadIdx.x; c < Shape::channels; c += kThreads)
      weight[c] = c < params.extent.channels ? params.weight.at(c) : A(0);
  }
  __device__ bool needs_grad() const { return params_.grad_x.data && params_.grad.data; }

  __device__ void copy_x(const ItemTiles& at) const {
    if (at.there()) copy_rows(x_stage_, params_.x, at);
  }
  __device__ void copy_grad(const ItemTiles& at) const {
    if (at.there() && needs_grad()) copy_rows(grad_stage_, params_.grad, at);
  }

  // The first tile of an item needs the vectors of its sample. The blocks of a cluster find all of them by themselves, with the
  // sums that the threads of the shape would get.
  __device__ void begin_item(int64_t sample) {
#pragma unroll
    for (int r = 0; r < kCluster; r++) {
      const int thread = r * kThreads + static_cast<int>(threadIdx.x);
      A dot = A(0);
      for (int c = thread; c < Shape::channels; c += Shape::threads) {
        const bool there = c < channels_;
        const int64_t i = sample * channels_ + c;
        shared_.grad_context[c] = there ? load_fresh(params_.grad_context + i) : A(0);
        shared_.scale[c] = there && params_.scale ? load_fresh(params_.scale + i) : A(1);
        if (there) dot += shared_.grad_context[c] * params_.context[i];
      }
      dot = warp_sum(dot);
      if (threadIdx.x % kWarp == 0) shared_.dots[thread / kWarp] = dot;
    }
    if (threadIdx.x < Shape::positions) shared_.grad_logit_sum[threadIdx.x] = A(0);
    __syncthreads();
  }

  // What a tile needs of the positions, for loads that are waited for while the copies are on their way.
  struct OfPositions {
    bool there, counts;
    A attention;
    unsigned positive[kWords] = {};
  };
  __device__ OfPositions of_positions(const ItemTiles& tiles) const {
    const int64_t sample = tiles.sample(), position = tiles.first + threadIdx.x;
    OfPositions of;
    of.there = threadIdx.x < Shape::positions && position < tiles.end;
    of.counts = of.there && params_.valid.counts(sample, position);
    of.attention = of.counts ? params_.attention[sample * tiles.end + position] : A(0);
    if (params_.positive && inside(tiles)) {
      const int64_t p = tiles.first + tile_.position();
#pragma unroll
      for (int i = 0; i < Shape::rows; i++) {
        const int c = tile_.channel(i);
        if (c < channels_) {
          const unsigned byte = load(params_.positive + (sample * channels_ + c) * bytes_of_bits_ + p / 8);
          of.positive[i * V / 32] |= (byte >> p % 8 & ((1u << V) - 1)) << i * V % 32;
        }
      }
    }
    return of;
  }

  // Takes the tile from the stages, and fills each place with what `next` has there as soon as it is free; copy_next_x() does
  // that for x.
  template <typename CopyNextX>
  __device__ void work_on(const ItemTiles& tiles, const OfPositions& of, const ItemTiles& next, const CopyNextX& copy_next_x) {
    const int64_t sample = tiles.sample(), first = tiles.first;
    tile_.take_rows(x_stage_);
    if (params_.valid.data && inside(tiles)) tile_.keep_valid(params_.valid.row(sample) + first + tile_.position());
    copy_next_x();
    A* const sums = shared_.sums[turn_];
    tile_.sum_over_channels(shared_.grad_context, sums);
    if constexpr (kCluster > 1) {
      turn_ ^= 1;
      cluster_barrier();
    } else {
      __syncthreads();
    }
    if (const int p = threadIdx.x; p < Shape::positions) {
      A u = A(0), dot = A(0);
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) u += sums[w * Shape::positions + p];
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) dot += shared_.dots[w];
      const A grad_logit = of.counts ? of.attention * (u - dot) : A(0);
      // An attention below zero marks a position that does not count.
      shared_.attention[p] = of.counts || !of.there ? of.attention : A(-1);
      shared_.grad_logit[p] = grad_logit;
      shared_.grad_logit_sum[p] += grad_logit;
    }
    __syncthreads();
    tile_.hide();
    PositionFactors<A> at[V];
    A grad_logits[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      at[j] = {shared_.attention[tile_.position() + j], shared_.grad_logit[tile_.position() + j]};
      grad_logits[j] = at[j].grad_logit;
    }
#pragma unroll
    for (int g = 0; g < Shape::groups; g++) grad_weight_[g] += tile_.sum_over_positions(grad_logits, g);

    // Without grad_x, g is not needed. An absent map counts as one without channels, because a row's channel is checked anyway.
    const int grad_x_channels = params_.grad_x.data ? channels_ : 0, grad_channels = params_.grad.data ? grad_x_channels : 0;
    const bool here = inside(tiles), next_here = inside(next);
    int64_t from = params_.grad.offset(next.sample(), tile_.channel(0), next.first + tile_.position());
    int64_t to = params_.grad_x.offset(sample, tile_.channel(0), first + tile_.position());
#pragma unroll
    for (int i0 = 0; i0 < Shape::rows; i0 += kTogether) {
      Vector<T, V> values[kTogether] = {};
      if (grad_channels > 0) {
#pragma unroll
        for (int i = 0; i < kTogether; i++) values[i] = *tile_.place(grad_stage_, i0 + i);
#pragma unroll
        for (int i = 0; i < kTogether; i++) hide_from_optimizer(values[i]);  // the values have arrived
        if (next.there()) {
#pragma unroll
          for (int i = 0; i < kTogether; i++, from += Shape::step * params_.grad.channel_stride)
            copy(tile_.place(grad_stage_, i0 + i), params_.grad.data + from,
                 next_here & (tile_.channel(i0 + i) < grad_channels));
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; i++, to += Shape::step * params_.grad_x.channel_stride) {
        const int c = tile_.channel(i0 + i);
        const ChannelFactors<A> of_channel{shared_.scale[c], shared_.grad_context[c], weight_[c]};
        const bool wanted = here & (c < grad_x_channels);
#pragma unroll
        for (int j = 0; j < V; j++) {
          const int bit = (i0 + i) * V + j;
          A grad = widen(values[i].data[j]);
          if (params_.positive) grad = of.positive[bit / 32] >> bit % 32 & 1 ? grad : A(0);
          values[i].data[j] = static_cast<T>(of_channel.grad_x(grad, at[j], !(at[j].attention < A(0))));
        }
        if (!wanted) continue;
        if constexpr (kOnce) {
          store_once(params_.grad_x.data + to, values[i]);
        } else {
          store_vector(params_.grad_x.data + to, values[i]);
        }
      }
    }
  }

  // Behind the last tile of an item: its part of the gradient of the weight.
  __device__ void end_item(const ItemTiles& tiles) {
    if (!params_.partial) return;
    A* const partial = params_.partial + static_cast<int64_t>(tiles.item) * channels_;
    A sum = A(0);
    for (int p = threadIdx.x % kWarp; p < Shape::positions; p += kWarp) sum += shared_.grad_logit_sum[p];
    sum = warp_sum(sum);
#pragma unroll
    for (int g = 0; g < Shape::groups; g++) {
      const int c = tile_.owned_channel(g);
      if (c >= 0 && c < channels_) partial[c] = grad_weight_[g] - sum * params_.context[tiles.sample() * channels_ + c];
      grad_weight_[g] = A(0);
    }
  }

 private:
  __device__ bool inside(const ItemTiles& at) const { return at.there() && at.first + tile_.position() < at.end; }
  __device__ void copy_rows(Stage* stage, const Map<const T>& map, const ItemTiles& at) const {
    const T* const start = map.at(at.sample(), 0, at.first);
    if constexpr (kOnce) {
      tile_.copy_rows(stage, start, map.channel_stride, channels_, inside(at), Eviction::first(params_.hints));
    } else {
      tile_.copy_rows(stage, start, map.channel_stride, channels_, inside(at));
    }
  }
  __device__ void copy(Stage* to, const T* from, bool wanted) const {
    if constexpr (kOnce) {
      copy_later(to, from, wanted, Eviction::first(params_.hints));
    } else {
      copy_later(to, from, wanted);
    }
  }

  const PoolBackwardParams<T>& params_;
  Stage *const x_stage_, *const grad_stage_;
  const A* const weight_;
  PoolBackwardTileShared<T, Shape, kCluster>& shared_;
  const int channels_;
  const int64_t bytes_of_bits_;
  RowTile<T, Shape, kCluster> tile_;
  A grad_weight_[Shape::groups] = {};
  int turn_ = 0;
};

template <typename T, typename Shape>
struct PoolBackwardRowItemsShared {
  Vector<T, Shape::vector> x[Shape::rows * Shape::threads], grad[Shape::rows * Shape::threads];  // the next tile
  acc_t<T> weight[Shape::channels];
  PoolBackwardTileShared<T, Shape> tile;
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    attention_pool_backward_row_items(PoolBackwardParams<T> params, ItemTiles tiles) {
  auto& shared = shared_memory<PoolBackwardRowItemsShared<T, Shape>>();
  PoolBackwardRows<T, Shape> rows(params, tiles, shared.x, shared.grad, shared.weight, shared.tile);
  tiles.begin(blockIdx.x);
  rows.copy_x(tiles);
  if (!params.grad_is_new) rows.copy_grad(tiles);
  rows.load_weight(params, shared.weight);
  wait_for_previous_launch();
  // Not before that wait: the next launch reads results of the launch before this one, and does not wait for them.
  if (params.next_is_early) let_next_launch_start();
  if (params.grad_is_new) rows.copy_grad(tiles);
  while (tiles.there()) {
    const auto of_positions = rows.of_positions(tiles);
    if (tiles.first_of_item()) {
      __syncthreads();  // no thread needs the vectors of the sample before any more
      rows.begin_item(tiles.sample());
    }
    const ItemTiles next = tiles.next();
    rows.work_on(tiles, of_positions, next, [&] { rows.copy_x(next); });
    if (tiles.last_of_item()) rows.end_item(tiles);
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
