// What the kernels of the backward pass of attention pooling share (attention_pool_backward.cuh): their parameters, the tiles
// of a block, and the terms of its formulas.
#pragma once

#include "attention_pool_split.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PoolBackwardParams {
  using A = acc_t<T>;
  Map<const T> x, grad;  // without grad, g = 0
  Map<T> grad_x;         // absent where nobody needs it
  Extent extent;
  Parameter<T> weight;              // w [C]; without a weight the pool averages
  const A* scale = nullptr;         // s [N, C]; null: s = 1
  const A* grad_context = nullptr;  // dctx [N, C]
  const A* context = nullptr;       // [N, C]
  const A* attention = nullptr;     // m [N, P]
  A* partial = nullptr;             // [N, splits, C]: every split's part of dw; null where nobody needs it
  int64_t first_sample = 0;         // of this launch
  unsigned splits = 0;              // of a sample
  bool next_is_early = false;       // whether launch_early() starts the next launch
  Valid<T> valid;                   // of the paths streamed, row_items, position_items and flat
  // The bits of a final ReLU, by which grad is masked: where the bit is 0, g counts as 0. Only row_items and position_items read
  // these and the two below.
  const uint8_t* positive = nullptr;
  // Whether launch_early() may start this launch, and whether grad is written by the same call.
  bool early = false, grad_is_new = false;
  bool hints = false;  // whether a ticketed launch tells the caches to forget x and grad first
};

// A block's part of the backward pass: its tiles, and the vectors of its sample.
template <typename T>
struct PoolBackwardSplit : SplitTiles {
  using A = acc_t<T>;
  const A *scale, *grad_context, *attention;

  __device__ PoolBackwardSplit(const PoolBackwardParams<T>& params, int tile_positions) : SplitTiles(params, tile_positions) {
    const int64_t row = sample * params.extent.channels;
    scale = params.scale ? params.scale + row : nullptr;
    grad_context = params.grad_context + row;
    attention = params.attention + sample * end;
  }

  // This block's part of dw. It is found where it is used, because a pointer that is kept over the tiles takes registers.
  __device__ A* partial(const PoolBackwardParams<T>& params, int64_t channels) const {
    return params.partial + (sample * params.splits + blockIdx.x % params.splits) * channels;
  }
};

// Returns dctx . context, computed by the whole block. of_warps is shared memory for one sum per warp. Contains a barrier.
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

// The factors of dx that belong to a position, m and dl, and those that belong to a channel, s, dctx and w.
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
  // Where the position does not count, not even an infinite gradient of the context reaches x.
  __device__ A grad_x(A grad, const PositionFactors<A>& at, bool counts) const {
    const A of_pool = multiply_add(at.attention, grad_context, at.grad_logit * weight);
    return multiply_add(grad, scale, counts ? of_pool : A(0));
  }
};

}  // namespace gcnet_ext::cuda
