// The fusion: out = x * scale + shift, with scale and shift [N, C] (csrc/ops.cpp: channel_fuse).
//
// The tiles are walked from the last to the first: the pool before it went through x from the first to the last, so that the
// second-level cache still holds the end of x.
#pragma once

#include "../plan_cuda.h"
#include "reduce.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct FuseParams {
  using A = acc_t<T>;
  Map<const T> x;  // without data: out = shift
  Map<T> out;      // dense
  Extent extent;
  Parameter<T> scale, shift;  // may be absent
  A shift_factor = 1;         // what shift is multiplied with
  int64_t first_tile = 0;     // of this launch, in the order of the walk

  // Of row n*C + c. An absent shift is -0, which changes no number at all.
  struct Factors {
    A scale, shift;
    __device__ T operator()(T x) const { return static_cast<T>(multiply_add(widen(x), scale, shift)); }
  };
  __device__ Factors factors(int64_t row) const {
    return {scale.at_or(row, A(1)), shift.given() ? shift.at(row) * shift_factor : -A(0)};
  }
};

// The number of this block's tile of `tiles`, backwards.
template <typename T>
__device__ __forceinline__ int64_t tile_from_the_end(const FuseParams<T>& params, int64_t tiles) {
  return tiles - 1 - (params.first_tile + blockIdx.x);
}

// ---- NCHW: `segments` stretches of memory with `rows` rows of P elements each; a tile is a piece of a stretch ---------------

template <typename T, int V>
__global__ void __launch_bounds__(kCudaSweepThreads, 4) fuse_rows(FuseParams<T> params, int64_t segments, int64_t rows) {
  using Factors = typename FuseParams<T>::Factors;
  constexpr int kTile = kCudaSweepThreads * V * kCudaSweepUnroll;
  const int64_t P = params.extent.positions, count = rows * P, tiles = (count + kTile - 1) / kTile;
  const int64_t tile = tile_from_the_end(params, segments * tiles), segment = tile / tiles, first = tile % tiles * kTile;
  const int64_t first_row = first / P, first_position = first % P;
  const T* x = params.x.data + segment * params.x.sample_stride;
  T* out = params.out.data + segment * params.out.sample_stride;

  // The row and position of an element of the tile; the division is for tiles of many rows only.
  struct Place {
    int64_t row, position;
  };
  const auto place = [&](int in_tile) -> Place {
    const int64_t position = first_position + in_tile;
    if (position < P) return {first_row, position};
    if (P >= kTile) return {first_row + 1, position - P};
    const unsigned row = static_cast<unsigned>(position) / static_cast<unsigned>(P);
    return {first_row + row, position - row * P};
  };
  const auto value_at = [&](const Place& at) {
    return params.x.data ? load(x + at.row * params.x.channel_stride + at.position) : T(0.0f);
  };

  Vector<T, V> values[kCudaSweepUnroll];
#pragma unroll
  for (int u = 0; u < kCudaSweepUnroll; u++) {
    const int in_tile = (u * kCudaSweepThreads + threadIdx.x) * V;
    values[u] = {};
    if constexpr (V == 1) {
      if (first + in_tile < count) values[u].data[0] = value_at(place(in_tile));
    } else {
      if (params.x.data && first + in_tile + V <= count) values[u] = load_vector<V>(x + first + in_tile);
    }
  }
#pragma unroll
  for (int u = 0; u < kCudaSweepUnroll; u++) {
    const int in_tile = (u * kCudaSweepThreads + threadIdx.x) * V;
    if (first + in_tile >= count) break;
    const Place at = place(in_tile);
    const Factors factors = params.factors(segment * rows + at.row);
    if (first + in_tile + V > count) {  // the last row ends within the access
      for (int j = 0; first + in_tile + j < count; j++) {
        store(out + first + in_tile + j, factors(value_at({at.row, at.position + j})));
      }
      break;
    }
    if (at.position + V <= P) {
#pragma unroll
      for (int j = 0; j < V; j++) values[u].data[j] = factors(values[u].data[j]);
    } else {  // one row ends within the access, and no more: P >= V
      const Factors next = params.factors(segment * rows + at.row + 1);
#pragma unroll
      for (int j = 0; j < V; j++) {
        const bool here = at.position + j < P;
        const Factors of_row{here ? factors.scale : next.scale, here ? factors.shift : next.shift};
        values[u].data[j] = of_row(values[u].data[j]);
      }
    }
    store_vector(out + first + in_tile, values[u]);
  }
}

// ---- channels_last: a thread keeps the factors of its V channels and goes through positions ---------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kCudaSweepThreads, 3) fuse_positions(FuseParams<T> params, CudaPositionGrid grid) {
  const int64_t C = params.extent.channels, P = params.extent.positions;
  const int64_t tile = tile_from_the_end(params, params.extent.samples * grid.splits * grid.channel_blocks);
  const int64_t sample = tile / (grid.splits * grid.channel_blocks), split = tile / grid.channel_blocks % grid.splits;
  const int64_t channel = (tile % grid.channel_blocks * grid.lanes + threadIdx.x % grid.lanes) * V;
  const int row = threadIdx.x / grid.lanes;
  if (row >= grid.rows || channel >= C) return;
  const int64_t begin = split * grid.split_positions, end = begin + grid.split_positions < P ? begin + grid.split_positions : P;

  using A = acc_t<T>;
  A scale[V], shift[V];
#pragma unroll
  for (int j = 0; j < V; j++) scale[j] = A(1), shift[j] = -A(0);
  if (params.scale.given()) params.scale.get(sample * C + channel, scale);
  if (params.shift.given()) params.shift.get(sample * C + channel, shift);
  typename FuseParams<T>::Factors factors[V];
#pragma unroll
  for (int j = 0; j < V; j++) factors[j] = {scale[j], params.shift.given() ? shift[j] * params.shift_factor : shift[j]};
  for (int64_t first = begin + row; first < end; first += kCudaSweepUnroll * grid.rows) {
    Vector<T, V> values[kCudaSweepUnroll];
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) {
      const int64_t p = first + u * grid.rows;
      values[u] = {};
      if (params.x.data && p < end) values[u] = load_vector<V>(params.x.at(sample, channel, p));
    }
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) {
      const int64_t p = first + u * grid.rows;
      if (p >= end) break;
#pragma unroll
      for (int j = 0; j < V; j++) values[u].data[j] = factors[j](values[u].data[j]);
      store_vector(params.out.at(sample, channel, p), values[u]);
    }
  }
}

}  // namespace gcnet_ext::cuda
