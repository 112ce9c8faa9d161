// Attention pooling in NCHW by items (attention_pool.cuh, items.cuh): a tile of all channels stays in the registers of a block,
// so that x is read once, and the next tile is on its way while the block works on this one.
#pragma once

#include "attention_pool_split.cuh"
#include "items.cuh"
#include "row_tile.cuh"

namespace gcnet_ext::cuda {

// What the threads tell each other about a tile.
template <typename T, typename Shape>
struct PoolRowSums {
  using A = acc_t<T>;
  A of_warps[Shape::warps * Shape::positions];  // over the channels of a warp
  A logits[Shape::positions];
};

// The sums of a split on its way through its tiles. kCluster: so many blocks share each tile (RowTile).
template <typename T, typename Shape, int kCluster = 1>
class PoolRowSplit {
  using A = acc_t<T>;
  using Tile = RowTile<T, Shape, kCluster>;
  static constexpr int V = Shape::vector;

 public:
  // weight [Shape::channels], and the bias behind it, are in shared memory.
  __device__ PoolRowSplit(const PoolParams<T>& params, const A* weight, PoolRowSums<T, Shape>& shared)
      : params_(params), weight_(weight), shared_(shared) {}
  // The threads of a block load them; all of them must have done so before the first add().
  __device__ static void load_weight(const PoolParams<T>& params, A* weight) {
    for (int c = threadIdx.x; c < Shape::channels; c += (Shape::threads / kCluster))
      weight[c] = c < params.extent.channels ? params.weight.at(c) : A(0);
    if (threadIdx.x == 0) weight[Shape::channels] = params.bias.at_or(0, A(0));
  }

  // Starts to copy a tile.
  __device__ static void copy(const PoolParams<T>& params, Vector<T, V>* stage, const ItemTiles& at) {
    const Tile tile;
    tile.copy_rows(stage, params.x.at(at.sample(), 0, at.first), params.x.channel_stride,
                   static_cast<int>(params.extent.channels), at.first + tile.position() < at.end);
  }
  // Waits for it. Afterwards the next one may be copied.
  __device__ void take(const Vector<T, V>* stage, const ItemTiles& at) {
    tile_.take_rows(stage);
    const int64_t position = at.first + tile_.position();
    if (params_.valid.data && position < at.end) tile_.keep_valid(params_.valid.row(at.sample()) + position);
  }
  // Adds the tile to the sums.
  __device__ void add(const ItemTiles& at) {
    const int64_t sample = at.sample(), first = at.first;
    tile_.sum_over_channels(weight_, shared_.of_warps);
    if constexpr (kCluster > 1) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
    if (const int p = threadIdx.x; p < Shape::positions) {
      A logit = weight_[Shape::channels];
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) logit += shared_.of_warps[w * Shape::positions + p];
      const bool within = first + p < at.end, counts = within && params_.valid.counts(sample, first + p);
      shared_.logits[p] = counts ? logit : lowest<A>();
      if (within && params_.attention && first_block()) params_.attention[sample * at.end + first + p] = logit;
    }
    if constexpr (kCluster > 1) {
      cluster_barrier();  // the other block may overwrite the sums of the warps now
    } else {
      __syncthreads();
    }

    const int lane = threadIdx.x % kWarp;
    A maximum = lowest<A>(), sum = A(0);
    for (int p = lane; p < Shape::positions; p += kWarp) maximum = larger(maximum, shared_.logits[p]);
    const A rescale = softmax_.raise_maximum(warp_max(maximum)), reference = softmax_.reference();
    for (int p = lane; p < Shape::positions; p += kWarp) sum += exponential(shared_.logits[p] - reference);
    softmax_.sum += warp_sum(sum);

    tile_.hide();
    A exponentials[V];
#pragma unroll
    for (int j = 0; j < V; j++) exponentials[j] = exponential(shared_.logits[tile_.position() + j] - reference);
#pragma unroll
    for (int g = 0; g < Shape::groups; g++) weighted_[g] = weighted_[g] * rescale + tile_.sum_over_positions(exponentials, g);
  }
  // Leaves the sums behind the last tile, and begins with the next split.
  __device__ void put(const ItemTiles& at) {
    const int channels = static_cast<int>(params_.extent.channels);
    A* const partial = params_.partial + static_cast<int64_t>(at.item) * (channels + 2);
#pragma unroll
    for (int g = 0; g < Shape::groups; g++) {
      const int c = tile_.owned_channel(g);
      if (c >= 0 && c < channels) partial[c] = weighted_[g];
      weighted_[g] = A(0);
    }
    if (threadIdx.x == 0 && first_block()) {
      partial[channels] = softmax_.maximum;
      partial[channels + 1] = softmax_.sum;
    }
    softmax_ = {};
  }

 private:
  __device__ static bool first_block() { return kCluster == 1 || cluster_rank() == 0; }

  const PoolParams<T>& params_;
  const A* const weight_;
  PoolRowSums<T, Shape>& shared_;
  Tile tile_;
  OnlineSoftmax<A> softmax_;
  A weighted_[Shape::groups] = {};
};

template <typename T, typename Shape>
struct PoolRowItemsShared {
  Vector<T, Shape::vector> stage[Shape::rows * Shape::threads];  // the next tile
  acc_t<T> weight[Shape::channels + 1];
  PoolRowSums<T, Shape> sums;
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    attention_pool_row_items(PoolParams<T> params, ItemTiles tiles) {
  let_next_launch_start();
  using Split = PoolRowSplit<T, Shape>;
  auto& shared = shared_memory<PoolRowItemsShared<T, Shape>>();
  tiles.begin(blockIdx.x);
  if (tiles.there()) Split::copy(params, shared.stage, tiles);
  Split::load_weight(params, shared.weight);
  Split split(params, shared.weight, shared.sums);
  __syncthreads();
  while (tiles.there()) {
    split.take(shared.stage, tiles);
    const ItemTiles next = tiles.next();
    if (next.there()) Split::copy(params, shared.stage, next);
    split.add(tiles);
    if (tiles.last_of_item()) split.put(tiles);
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
