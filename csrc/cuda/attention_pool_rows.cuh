// Attention pooling in NCHW (attention_pool.cuh): a tile of all channels stays in the registers of a block, so that x is read
// once.
#pragma once

#include "attention_pool_split.cuh"
#include "row_tile.cuh"

namespace gcnet_ext::cuda {

template <typename A, typename Shape>
struct PoolRowsShared {
  A weight[Shape::channels];
  A sums[Shape::warps * Shape::positions];  // over the channels of a warp
  A logits[Shape::positions];
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) attention_pool_rows(PoolParams<T> params) {
  using A = acc_t<T>;
  if (params.merged_later) let_next_launch_start();
  constexpr int V = Shape::vector;
  auto& shared = shared_memory<PoolRowsShared<A, Shape>>();
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
  for (int c = threadIdx.x; c < Shape::channels; c += Shape::threads)
    shared.weight[c] = c < channels ? params.weight.at(c) : A(0);
  __syncthreads();

  OnlineSoftmax<A> softmax;
  A weighted[Shape::groups];
#pragma unroll
  for (int g = 0; g < Shape::groups; g++) weighted[g] = A(0);
  for (int64_t first = split.begin; first < split.end; first += split.step) {
    tile.load_rows(x + first, params.x.channel_stride, channels, first + tile.position() < split.end);
    prefetch_tile(first + split.step);
    tile.sum_over_channels(shared.weight, shared.sums);
    __syncthreads();
    if (const int p = threadIdx.x; p < Shape::positions) {
      A logit = bias;
#pragma unroll
      for (int w = 0; w < Shape::warps; w++) logit += shared.sums[w * Shape::positions + p];
      const bool inside = first + p < split.end;
      shared.logits[p] = inside ? logit : lowest<A>();
      if (inside && split.logits) split.logits[first + p] = logit;
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

template <typename T>
void launch_attention_pool_rows(const PoolParams<T>& params, const CudaPoolPlan& plan, cudaStream_t stream) {
  with_row_shape<T>(plan, [&](auto shape) {
    using Shape = decltype(shape);
    const size_t shared = std::max(shared_bytes<PoolRowsShared<acc_t<T>, Shape>>(), merge_shared_bytes(params));
    launch_splits(attention_pool_rows<T, Shape>, params, plan, shared, stream);
  });
}

}  // namespace gcnet_ext::cuda
