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
  Vector<T, kWidest<T>>* stage;
  float* coefficient;  // [rows], and zeros up to a whole unit
  float* sums;         // [groups, unit]

  __host__ __device__ PositionSumsShared(auto& memory, const FlatPieces& pieces) {
    const int columns = pieces.unit() / kWidest<T>;
    memory.take(stage, accesses_of<T>(pieces.rows * pieces.positions));
    memory.take(coefficient, pieces.rows);
    memory.take(sums, FlatColumns::groups_of(columns) * pieces.unit());
  }
};

template <typename T>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks)
    flat_position_sums(PositionSumsParams<T> params, FlatPieces pieces) {
  let_next_launch_start();
  constexpr int V = kWidest<T>;
  const auto shared = shared_memory<PositionSumsShared<T>>(pieces);
  const FlatColumns own(pieces.unit() / V);
  const unsigned end = pieces.bound(blockIdx.x + 1);
  unsigned item = pieces.bound(blockIdx.x);
  copy_piece(shared.stage, params.x, pieces.at(item));
  for (; item < end; item++) {
    const FlatPiece piece = pieces.at(item);
    for (int r = threadIdx.x; r < pieces.rows; r += kFlatThreads) {
      const int c = piece.first_row + r;
      float value = 0.f;
      if (r < piece.rows)
        value = params.of_sample ? params.of_sample[piece.sample * pieces.channels + c] : params.coefficient.at(c);
      shared.coefficient[r] = value;
    }
    wait_for_copies();
    __syncthreads();
    const int accesses = accesses_of<T>(piece.rows * pieces.positions);
    for (int column = own.column; column < own.columns; column += kFlatThreads) {
      const FlatColumn<V> elements(column, pieces.positions);
      float sum[V] = {};
      const float* coefficient = shared.coefficient + own.group * pieces.unit_rows;
#pragma unroll 2
      for (int a = own.group * own.columns + column; a < accesses; a += own.groups * own.columns) {
        const Vector<T, V> values = shared.stage[a];
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += coefficient[elements.row[j]] * widen(values.data[j]);
        coefficient += own.groups * pieces.unit_rows;
      }
      float* const to = shared.sums + own.group * pieces.unit() + column * V;
#pragma unroll
      for (int j = 0; j < V; j += 4) store_neighbours<4>(to + j, {sum[j], sum[j + 1], sum[j + 2], sum[j + 3]});
    }
    __syncthreads();
    if (item + 1 < end) copy_piece(shared.stage, params.x, pieces.at(item + 1));
    for (int p = threadIdx.x; p < pieces.positions; p += kFlatThreads) {
      float total = 0.f;
#pragma unroll 8
      for (int r = 0; r < own.groups * pieces.unit_rows; r++) total += shared.sums[r * pieces.positions + p];
      params.partial[static_cast<int64_t>(item) * pieces.positions + p] = total;
    }
  }
}

template <typename T>
void launch_flat_position_sums(const PositionSumsParams<T>& params, const FlatPieces& pieces, cudaStream_t stream) {
  launch_items(flat_position_sums<T>, pieces.items, kFlatBlocks, kFlatThreads, shared_bytes<PositionSumsShared<T>>(pieces),
               /*early=*/false, stream, params, pieces);
}

// The sum of the pieces of a sample at a position, in their order.
__device__ __forceinline__ float sum_of_pieces(const float* partial, const FlatPieces& pieces, int64_t sample, int position) {
  const float* const from = partial + sample * pieces.pieces * pieces.positions + position;
  float total = 0.f;
  load_ahead<16>(
      0, pieces.pieces, 1, [&](int64_t i) { return load_fresh(from + i * pieces.positions); },
      [&](int64_t, float value) { total += value; });
  return total;
}

}  // namespace gcnet_ext::cuda
