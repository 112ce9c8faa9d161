// The backward pass of attention pooling in channels_last by items (attention_pool_backward.cuh, items.cuh): a few positions of x
// stay in the registers of the warps that share their channels, and the same positions of g in shared memory until they are
// needed. The next tile of x is on its way while a warp works on one, and so is each position of the next tile of g once that of
// this tile is used.
#pragma once

#include "attention_pool_backward_split.cuh"
#include "attention_pool_positions.cuh"
#include "items.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PoolBackwardPositionItemsShared {
  using A = acc_t<T>;
  Vector<T, kWidest<T>>*x, *grad;  // [kCudaPositionsPerWarp, threads]: the next tile
  A* sums;                         // [2, warps, positions]: over the channels of a warp, for two tiles in turn
  A* dots;                         // [warps]
  A* totals;                       // [groups, channels]

  __host__ __device__ PoolBackwardPositionItemsShared(auto& memory, int warps, int groups, int64_t channels) {
    memory.take(x, kCudaPositionsPerWarp * warps * kWarp);
    memory.take(grad, kCudaPositionsPerWarp * warps * kWarp);
    memory.take(sums, 2 * warps * kCudaPositionsPerWarp);
    memory.take(dots, warps);
    memory.take(totals, groups * channels);
  }
};

// Warp w of a group of `warps` has the channels (32*w + lane)*V, (32*w + lane)*V + 1, ... The groups work on different
// positions.
template <typename T>
__global__ void __launch_bounds__(512, 1)
    attention_pool_backward_position_items(PoolBackwardParams<T> params, ItemTiles tiles, int warps) {
  using A = acc_t<T>;
  constexpr int V = kWidest<T>, kPositions = kCudaPositionsPerWarp, kTogether = kPositions / 2;
  constexpr int kLowest = kWarp / kPositions;  // lanes that differ in lower bits have the same position
  const int64_t channels = params.extent.channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, all_warps = blockDim.x / kWarp;
  const int group = warp / warps, groups = all_warps / warps;
  const auto shared = shared_memory<PoolBackwardPositionItemsShared<T>>(all_warps, groups, channels);
  const int64_t channel = static_cast<int64_t>(warp % warps * kWarp + lane) * V;
  const bool has_channels = channel < channels, has_grad = params.grad.data && params.grad_x.data;
  const int64_t bytes_of_bits = (channels + 7) / 8;
  const auto first_of_group = [&](const ItemTiles& at) { return at.first + group * kPositions; };
  const auto copy = [&](Vector<T, V>* stage, const Map<const T>& map, const ItemTiles& at, int i) {
    const int64_t p = first_of_group(at) + i;
    const bool wanted = at.there() && has_channels && p < at.end;
    copy_later(stage + i * blockDim.x + threadIdx.x, map.data + map.offset(at.sample(), channel, p), wanted);
  };
  tiles.begin(blockIdx.x);
  const auto copy_first_grad = [&] {
#pragma unroll
    for (int i = 0; i < kPositions; i++) copy(shared.grad, params.grad, tiles, i);
  };
#pragma unroll
  for (int i = 0; i < kPositions; i++) copy(shared.x, params.x, tiles, i);
  if (has_grad && !params.grad_is_new) copy_first_grad();
  ChannelFactors<A> factors[V] = {};
  A weight[V] = {}, grad_weight[V] = {}, grad_logit_sum = A(0), dot = A(0);  // grad_logit_sum: over this lane's positions
  if (has_channels) params.weight.get(channel, weight);
#pragma unroll
  for (int j = 0; j < V; j++) factors[j].weight = weight[j];
  wait_for_previous_launch();
  // Not before that wait: the next launch reads results of the launch before this one, and does not wait for them.
  if (params.next_is_early) let_next_launch_start();
  if (has_grad && params.grad_is_new) copy_first_grad();

  int turn = 0;
  while (tiles.there()) {
    const int64_t sample = tiles.sample(), first = first_of_group(tiles);
    if (tiles.first_of_item()) {
      const int64_t row = sample * channels + channel;
      A sum = A(0);
#pragma unroll
      for (int j = 0; j < V; j++) {
        factors[j].scale = has_channels && params.scale ? load_fresh(params.scale + row + j) : A(1);
        factors[j].grad_context = has_channels ? load_fresh(params.grad_context + row + j) : A(0);
        sum += has_channels ? factors[j].grad_context * params.context[row + j] : A(0);
      }
      dot = warp_sum(sum);
      if (warps > 1) {
        // Every warp has read those of the sample before: a barrier of its last tile came after that.
        if (lane == 0) shared.dots[warp] = dot;
        __syncthreads();
        dot = A(0);
        for (int w = group * warps; w < (group + 1) * warps; w++) dot += shared.dots[w];
      }
    }
    // A bit for every position, whether it counts, and for every element of g, whether it passed the final ReLU.
    unsigned counted = 0;
    uint64_t positive = 0;
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      const int64_t p = first + i;
      if (p >= tiles.end) continue;
      if (params.valid.counts(sample, p)) counted |= 1u << i;
      if (params.positive && has_channels) {
        const unsigned byte = load(params.positive + (sample * tiles.end + p) * bytes_of_bits + channel / 8);
        positive |= static_cast<uint64_t>(byte >> channel % 8 & ((1u << V) - 1)) << (i * V);
      }
    }
    const int own = lane / kLowest;  // this lane's position
    const bool counts = counted >> own & 1;
    const A attention = counts ? params.attention[sample * tiles.end + first + own] : A(0);
    wait_for_copies();
    Vector<T, V> values[kPositions];
#pragma unroll
    for (int i = 0; i < kPositions; i++) values[i] = shared.x[i * blockDim.x + threadIdx.x];
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      hide_from_optimizer(values[i]);  // the values have arrived
      if (params.valid.data && !(counted >> i & 1)) values[i] = {};
    }
    const ItemTiles next = tiles.next();
#pragma unroll
    for (int i = 0; i < kPositions; i++) copy(shared.x, params.x, next, i);

    A sum[kPositions];
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      sum[i] = A(0);
#pragma unroll
      for (int j = 0; j < V; j++) sum[i] += factors[j].grad_context * widen(values[i].data[j]);
    }
    const Share share = transposed_sum<kPositions, 1, kWarp / 2>(sum, lane);  // share.first is `own`
    A u = sum[0];
    if (warps > 1) {
      A* of_tile = shared.sums + turn * all_warps * kPositions;
      turn ^= 1;
      if (share.owner) of_tile[warp * kPositions + own] = u;
      __syncthreads();
      u = A(0);
      for (int w = 0; w < warps; w++) u += of_tile[(group * warps + w) * kPositions + own];
    }
    const A grad_logit = counts ? attention * (u - dot) : A(0);
    grad_logit_sum += grad_logit;
#pragma unroll
    for (int i = 0; i < kPositions; i++) hide_from_optimizer(values[i]);
#pragma unroll
    for (int i = 0; i < kPositions; i++) {
      const A of_position = __shfl_sync(kAllLanes, grad_logit, i * kLowest);
#pragma unroll
      for (int j = 0; j < V; j++) grad_weight[j] += of_position * widen(values[i].data[j]);
    }
    const bool wanted = has_channels && params.grad_x.data;
#pragma unroll 1
    for (int i0 = 0; i0 < kPositions; i0 += kTogether) {
      const unsigned passes = static_cast<unsigned>(positive >> (i0 * V));
      Vector<T, V> result[kTogether] = {};
      if (has_grad) {
#pragma unroll
        for (int i = 0; i < kTogether; i++) result[i] = shared.grad[(i0 + i) * blockDim.x + threadIdx.x];
#pragma unroll
        for (int i = 0; i < kTogether; i++) hide_from_optimizer(result[i]);  // the values have arrived
#pragma unroll
        for (int i = 0; i < kTogether; i++) copy(shared.grad, params.grad, next, i0 + i);
      }
#pragma unroll
      for (int i = 0; i < kTogether; i++) {
        const int at_tile = i0 + i;
        const PositionFactors<A> at{__shfl_sync(kAllLanes, attention, at_tile * kLowest),
                                    __shfl_sync(kAllLanes, grad_logit, at_tile * kLowest)};
#pragma unroll
        for (int j = 0; j < V; j++) {
          A grad = widen(result[i].data[j]);
          if (params.positive) grad = passes >> (i * V + j) & 1 ? grad : A(0);
          result[i].data[j] = static_cast<T>(factors[j].grad_x(grad, at, counted >> at_tile & 1));
        }
        const int64_t p = first + at_tile;
        if (wanted && p < tiles.end) store_vector(params.grad_x.at(sample, channel, p), result[i]);
      }
    }

    if (params.partial && tiles.last_of_item()) {
      const A* const context = params.context + sample * channels;
      const A sum_of_group = sum_over_lanes(grad_logit_sum, kLowest, kWarp / 2);
      __syncthreads();  // no thread needs the totals of the item before any more
      if (has_channels) {
#pragma unroll
        for (int j = 0; j < V; j++)
          shared.totals[group * channels + channel + j] = grad_weight[j] - sum_of_group * context[channel + j];
      }
      __syncthreads();
      A* const partial = params.partial + static_cast<int64_t>(tiles.item) * channels;
      for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
        A total = A(0);
        for (int g = 0; g < groups; g++) total += shared.totals[g * channels + c];
        partial[c] = total;
      }
#pragma unroll
      for (int j = 0; j < V; j++) grad_weight[j] = A(0);
      grad_logit_sum = A(0);
    }
    tiles = next;
  }
}

template <typename T>
size_t backward_position_items_bytes(const Extent& extent, const CudaPoolPlan& plan) {
  const PositionWarps warps(extent, plan);
  return shared_bytes<PoolBackwardPositionItemsShared<T>>(warps.all, warps.groups, extent.channels);
}

template <typename T>
bool backward_position_items_fit(const CudaPoolPlan& plan, const Extent& extent) {
  return items_fit(backward_position_items_bytes<T>(extent, plan), extent.samples * plan.splits);
}

template <typename T>
void launch_attention_pool_backward_position_items(const PoolBackwardParams<T>& params, const CudaPoolPlan& plan,
                                                   cudaStream_t stream) {
  const Extent& extent = params.extent;
  const ItemTiles tiles(extent.samples, extent.positions, plan.splits, plan.tile_positions);
  launch_items(attention_pool_backward_position_items<T>, tiles.items, 512 / plan.threads, plan.threads,
               backward_position_items_bytes<T>(extent, plan), params.early, stream, params, tiles,
               PositionWarps(extent, plan).of_group);
}

}  // namespace gcnet_ext::cuda
