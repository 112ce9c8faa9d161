// The fusion: out = act(x * scale + shift + residual), with scale and shift [N, C] (csrc/ops.cpp: channel_fuse). Most blocks
// have no residual and act is the identity: for these there are two fast kernels, fuse_rows and fuse_positions.
//
// The tiles are walked from the last to the first: the pool before it went through x from the first to the last, so that the
// second-level cache still holds the end of x.
#pragma once

#include <algorithm>

#include "channel_fuse_items.cuh"
#include "fusion.cuh"

namespace gcnet_ext::cuda {

// The tile of this block among `tiles`, counted from the last one.
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
  const RowPiece<kTile> piece(first, P);
  const T* x = params.x.data + segment * params.x.sample_stride;
  T* out = params.out.data + segment * params.out.sample_stride;

  const auto value_at = [&](const typename RowPiece<kTile>::Place& at) {
    return params.x.data ? load(x + at.row * params.x.channel_stride + at.position) : T(0.0f);
  };

  Vector<T, V> values[kCudaSweepUnroll];
#pragma unroll
  for (int u = 0; u < kCudaSweepUnroll; u++) {
    const int in_tile = (u * kCudaSweepThreads + threadIdx.x) * V;
    values[u] = {};
    if constexpr (V == 1) {
      if (first + in_tile < count) values[u].data[0] = value_at(piece.at(in_tile));
    } else {
      if (params.x.data && first + in_tile + V <= count) values[u] = load_vector<V>(x + first + in_tile);
    }
  }
#pragma unroll
  for (int u = 0; u < kCudaSweepUnroll; u++) {
    const int in_tile = (u * kCudaSweepThreads + threadIdx.x) * V;
    if (first + in_tile >= count) break;
    const auto at = piece.at(in_tile);
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
    } else {  // exactly one row ends within the access, because P >= V
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
  if (params.scale.present()) params.scale.get(sample * C + channel, scale);
  if (params.shift.present()) params.shift.get(sample * C + channel, shift);
  typename FuseParams<T>::Factors factors[V];
#pragma unroll
  for (int j = 0; j < V; j++) factors[j] = {scale[j], params.shift.present() ? shift[j] * params.shift_factor : shift[j]};
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

// Sets first_tile of the params.
template <typename T>
void launch_channel_fuse(FuseParams<T> params, cudaStream_t stream) {
  const Extent& extent = params.extent;
  if (extent.samples == 0 || extent.positions == 0) return;
  const auto launch_tiles = [&](auto kernel, int64_t tiles, auto... arguments) {
    for (params.first_tile = 0; params.first_tile < tiles; params.first_tile += kCudaMaxBlocks) {
      const auto blocks = static_cast<unsigned>(std::min(tiles - params.first_tile, kCudaMaxBlocks));
      launch(kernel, dim3(blocks), dim3(kCudaSweepThreads), 0, stream, params, arguments...);
    }
  };
  constexpr int V = kWidest<T>;
  const CudaShape shape = common_shape<T>(extent, params.x, params.out);
  if (extent.channels_last) {
    const bool wide = cuda_vector(shape) == V;
    const CudaPositionGrid grid = plan_cuda_positions(shape, wide ? V : 1, extent.positions);
    const int64_t tiles = extent.samples * grid.splits * grid.channel_blocks;
    return wide ? launch_tiles(fuse_positions<T, V>, tiles, grid) : launch_tiles(fuse_positions<T, 1>, tiles, grid);
  }
  if (extent.channels == 1) params.x.channel_stride = extent.positions;  // the stride of a single channel is arbitrary
  const RowSegments in = row_segments<T>(extent, params.x, params.out);
  const int64_t tile = kCudaSweepThreads * kCudaSweepUnroll * (in.wide ? V : 1);
  const int64_t tiles = in.count * ((in.rows * extent.positions + tile - 1) / tile);
  return launch_tiles(in.wide ? fuse_rows<T, V> : fuse_rows<T, 1>, tiles, in.count, in.rows);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_channel_fuse)

// ---- any layout: a thread has an element at a time, with everything that the fusion can have --------------------------------

template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    fuse_elements(FuseParams<T> params, Map<const T> residual, bool relu, Valid<T> valid) {
  using A = acc_t<T>;
  const Extent& extent = params.extent;
  const RowsOfSample rows(extent);
  for_elements(extent.samples * extent.channels * extent.positions, [&](int64_t i) {
    const Place at(rows, i);
    auto factors = params.factors(at.sample * extent.channels + at.channel);
    if (valid.data) factors.shift = valid.at(at.sample, at.position) ? factors.shift * valid.shares[at.sample] : -A(0);
    A value = multiply_add(params.x.data ? widen(load(at.in(params.x))) : A(0), factors.scale, factors.shift);
    if (residual.data) value += widen(load(at.in(residual)));
    if (relu && value < A(0)) value = A(0);  // a NaN is passed on
    store(at.in(params.out), static_cast<T>(value));
  });
}

template <typename T>
void launch_fuse_elements(const Fusion<T>& fusion, cudaStream_t stream) {
  const FuseParams<T>& params = fusion;
  launch_elements(fuse_elements<T>, params.extent.elements(), stream, params, fusion.residual, fusion.relu, fusion.valid);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_fuse_elements)

// Computes the fusion by the fastest kernel that has its operands.
template <typename T>
void channel_fuse(const Fusion<T>& fusion, cudaStream_t stream) {
  if (tuning().by_items() && launch_fuse_items(fusion, stream)) return;
  if (fusion.needs_elements()) {
    launch_fuse_elements(fusion, stream);
  } else {
    launch_channel_fuse<T>(fusion, stream);
  }
  if (fusion.positive) launch_positive_bits(read_only(fusion.out), fusion.extent, fusion.positive, stream);
}

}  // namespace gcnet_ext::cuda
