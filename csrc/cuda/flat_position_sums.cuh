// The first stage of attention pooling by pieces, and of its backward pass: for every piece, sums over its rows
//
//   partial_p = sum_c coefficient_c x_cp
//
// with w, for the logits, or with dctx. The stage after it adds up the pieces of a sample in their order.
#pragma once

#include "flat_rows.cuh"
#include "parameter.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PositionSumsParams {
  FlatMap<const T> x;
  Parameter<T> coefficient;          // [C]
  const float* of_sample = nullptr;  // or [N, C]
  float* partial = nullptr;          // [N, pieces, P]
};

template <typename T>
struct PositionSumsShared {
  Vector<T, kWidest<T>>* stages;  // [2, accesses]: of this piece and the next one
  float* coefficient;             // of the channels, and zeros up to the end of all pieces and one row more
  float* sums;                    // [groups, unit]

  __host__ __device__ static int coefficients(const FlatPieces& pieces) {
    return static_cast<int>(pieces.pieces) * pieces.rows + 1;
  }
  __host__ __device__ PositionSumsShared(auto& memory, const FlatPieces& pieces) {
    memory.take(stages, 2 * stage_accesses<T>(pieces));
    memory.take(coefficient, coefficients(pieces));
    memory.take(sums, FlatColumns::groups_of(pieces.unit() / kWidest<T>) * pieces.unit());
  }
};

// sums[group, r, p] = the part of the rows number r of the units of a group.
template <typename T>
__device__ __forceinline__ void sum_units(const FlatPieces& pieces, const FlatPiece& piece, const FlatColumns& own,
                                          const Vector<T, kWidest<T>>* stage, const PositionSumsShared<T>& shared) {
  constexpr int V = kWidest<T>;
  const int accesses = accesses_of<T>(piece.rows * pieces.positions), step = own.groups * own.columns;
  for (int column = own.column; column < own.columns; column += kFlatThreads) {
    const FlatColumn<V> place(column, pieces.positions);
    const float* coefficient = shared.coefficient + piece.first_row + own.group * pieces.unit_rows + place.row;
    uint32_t in_first_row[V];
    float sum[V] = {};
#pragma unroll
    for (int j = 0; j < V; j++) in_first_row[j] = place.in_first_row(j);
#pragma unroll 2
    for (int a = own.group * own.columns + column; a < accesses; a += step) {
      const Vector<T, V> values = stage[a];
      const float first = coefficient[0], second = coefficient[1];
#pragma unroll
      for (int j = 0; j < V; j++) sum[j] += blend(in_first_row[j], first, second) * widen(values.data[j]);
      coefficient += own.groups * pieces.unit_rows;
    }
    float* const to = shared.sums + own.group * pieces.unit() + column * V;
#pragma unroll
    for (int j = 0; j < V; j += 4) store_neighbours<4>(to + j, {sum[j], sum[j + 1], sum[j + 2], sum[j + 3]});
  }
}

template <typename T>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks)
    flat_position_sums(PositionSumsParams<T> params, FlatPieces pieces) {
  let_next_launch_start();
  const auto shared = shared_memory<PositionSumsShared<T>>(pieces);
  const FlatColumns own(pieces.unit() / kWidest<T>);
  const unsigned end = pieces.bound(blockIdx.x + 1);
  unsigned item = pieces.bound(blockIdx.x);
  Vector<T, kWidest<T>>*stage = shared.stages, *next = stage + stage_accesses<T>(pieces);
  copy_piece(stage, params.x, pieces.at(item));
  int64_t loaded = -1;  // the sample whose coefficients are there
  for (; item < end; item++) {
    const FlatPiece piece = pieces.at(item);
    if (loaded < 0 || (params.of_sample && loaded != piece.sample)) {
      loaded = piece.sample;
      load_ahead<8>(
          threadIdx.x, shared.coefficients(pieces), kFlatThreads,
          [&](int64_t c) {
            if (c >= pieces.channels) return 0.f;
            return params.of_sample ? params.of_sample[loaded * pieces.channels + c] : params.coefficient.at(c);
          },
          [&](int64_t c, float value) { shared.coefficient[c] = value; });
    }
    wait_for_copies();
    __syncthreads();
    if (item + 1 < end) copy_piece(next, params.x, pieces.at(item + 1));
    sum_units(pieces, piece, own, stage, shared);
    __syncthreads();
    for (int p = threadIdx.x; p < pieces.positions; p += kFlatThreads) {
      float total = 0.f;
#pragma unroll 8
      for (int r = 0; r < own.groups * pieces.unit_rows; r++) total += shared.sums[r * pieces.positions + p];
      params.partial[static_cast<int64_t>(item) * pieces.positions + p] = total;
    }
    std::swap(stage, next);
  }
}

template <typename T>
void launch_flat_position_sums(const PositionSumsParams<T>& params, const FlatPieces& pieces, cudaStream_t stream) {
  launch_items(flat_position_sums<T>, pieces.items, kFlatBlocks, kFlatThreads, shared_bytes<PositionSumsShared<T>>(pieces),
               /*early=*/false, stream, params, pieces);
}

// The sum of the pieces of a sample at a position, in their order.
__device__ __forceinline__ float sum_of_pieces(const float* partial, const FlatPieces& pieces, int64_t sample, int position) {
  constexpr int kTogether = 16;  // loads under way
  const float* from = partial + sample * pieces.pieces * pieces.positions + position;
  float total = 0.f;
  for (int left = static_cast<int>(pieces.pieces); left > 0; left -= kTogether, from += kTogether * pieces.positions) {
    float values[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; u++) values[u] = u < left ? load_fresh(from + u * pieces.positions) : 0.f;
#pragma unroll
    for (int u = 0; u < kTogether; u++) total += values[u];
  }
  return total;
}

}  // namespace gcnet_ext::cuda
