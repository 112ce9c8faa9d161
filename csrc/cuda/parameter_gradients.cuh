// The gradients of the parameters: sums over the samples of products of [N, ...] tensors, all of them in one launch.
//
//   of a matrix    grad[r, k] = sum_n left[n, r] right[n, k]
//   of a vector    grad[r] = sum_n left[n, r]
//
// n counts samples, or for the mask's weight the splits of all samples; the sums run over n in a fixed order.
#pragma once

#include <algorithm>

#include "reduce.cuh"

namespace gcnet_ext::cuda {

constexpr int kGradientThreads = 256, kGradientWarps = kGradientThreads / kWarp;
constexpr int kGradientRows = 2;     // of a matrix, per warp
constexpr int kGradientColumns = 4;  // of a matrix, per lane
constexpr int kGradientRowTile = kGradientWarps * kGradientRows, kGradientColumnTile = kWarp * kGradientColumns;
constexpr int kGradientStage = 32;                                   // terms of a matrix that are in shared memory at a time
constexpr int kGradientEntries = 8;                                  // of a vector, per block
constexpr int kGradientTerms = kGradientThreads / kGradientEntries;  // of each of them, at a time
template <typename T>
constexpr int kGradientBlocks =
    sizeof(acc_t<T>) == sizeof(float) ? 3 : 1;  // on a multiprocessor: enough registers for no spills
constexpr int kMostGradients = 2 * 6 + 1;       // both branches and the mask

template <typename T>
struct GradientOf {
  using A = acc_t<T>;
  const A* left = nullptr;                                                      // [terms, left_stride]
  const A* right = nullptr;                                                     // [terms, right_stride], for a matrix
  int64_t terms = 0, left_stride = 0, right_stride = 0, rows = 0, columns = 0;  // no columns: a vector
  MutableParameter<T> gradient;
  int64_t first_block = 0, end_block = 0;  // the blocks that work on it

  int64_t blocks() const {
    constexpr int64_t kRowTile = kGradientRowTile, kColumnTile = kGradientColumnTile;
    if (columns == 0) return (rows + kGradientEntries - 1) / kGradientEntries;
    return (rows + kRowTile - 1) / kRowTile * ((columns + kColumnTile - 1) / kColumnTile);
  }
};

template <typename T>
struct GradientParams {
  GradientOf<T> of[kMostGradients];
  int count = 0;

  void add(GradientOf<T> gradient) {
    gradient.first_block = blocks();
    gradient.end_block = gradient.first_block + gradient.blocks();
    of[count++] = gradient;
  }
  int64_t blocks() const { return count ? of[count - 1].end_block : 0; }
};

template <typename T>
constexpr size_t gradient_shared_bytes() {
  using A = acc_t<T>;
  constexpr size_t matrix =
      shared_bytes<A>(kGradientStage * kGradientRowTile) + shared_bytes<A>(kGradientStage * kGradientColumnTile);
  return std::max(matrix, shared_bytes<A>(kGradientThreads));
}

// values[u] is an entry of one of kGradientStage terms from first_term on; kWidth entries of each, from number `first` on, are
// dealt to the threads in turn. Zeros where there is nothing.
template <int kWidth, typename A>
__device__ __forceinline__ void load_terms(const A* from, int64_t stride, int64_t first_term, int64_t terms, int64_t first,
                                           int64_t end, A (&values)[kGradientStage * kWidth / kGradientThreads]) {
#pragma unroll
  for (int u = 0; u < kGradientStage * kWidth / kGradientThreads; u++) {
    const int i = u * kGradientThreads + threadIdx.x;
    const int64_t n = first_term + i / kWidth, entry = first + i % kWidth;
    values[u] = A(0);
    if (n < terms && entry < end) values[u] = from[n * stride + entry];
  }
}

// A block has a tile of rows and columns; a warp some of its rows, a lane some neighbouring columns.
template <typename T>
__device__ __forceinline__ void matrix_gradient(const GradientOf<T>& of, int64_t block) {
  using A = acc_t<T>;
  constexpr int kRows = kGradientRowTile, kColumns = kGradientColumnTile;
  constexpr int kOfLeft = kGradientStage * kRows / kGradientThreads, kOfRight = kGradientStage * kColumns / kGradientThreads;
  const int64_t column_tiles = (of.columns + kColumns - 1) / kColumns;
  const int64_t first_row = block / column_tiles * kRows, first_column = block % column_tiles * kColumns;
  const int own_row = threadIdx.x / kWarp * kGradientRows, own_column = threadIdx.x % kWarp * kGradientColumns;
  SharedMemory shared;
  A* left = shared.take<A>(kGradientStage * kRows);  // [terms][rows]
  A* right = shared.take<A>(kGradientStage * kColumns);
  A sum[kGradientRows][kGradientColumns] = {};
  for (int64_t first_term = 0; first_term < of.terms; first_term += kGradientStage) {
    A of_left[kOfLeft], of_right[kOfRight];
    load_terms<kRows>(of.left, of.left_stride, first_term, of.terms, first_row, of.rows, of_left);
    load_terms<kColumns>(of.right, of.right_stride, first_term, of.terms, first_column, of.columns, of_right);
    __syncthreads();  // what is there has been used
#pragma unroll
    for (int u = 0; u < kOfLeft; u++) left[u * kGradientThreads + threadIdx.x] = of_left[u];
#pragma unroll
    for (int u = 0; u < kOfRight; u++) right[u * kGradientThreads + threadIdx.x] = of_right[u];
    __syncthreads();
#pragma unroll 4
    for (int n = 0; n < kGradientStage; n++) {
      const auto of_rows = *reinterpret_cast<const Vector<A, kGradientRows>*>(left + n * kRows + own_row);
      const auto of_columns = *reinterpret_cast<const Vector<A, kGradientColumns>*>(right + n * kColumns + own_column);
#pragma unroll
      for (int r = 0; r < kGradientRows; r++) {
#pragma unroll
        for (int k = 0; k < kGradientColumns; k++) sum[r][k] += of_rows.data[r] * of_columns.data[k];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kGradientRows; r++) {
#pragma unroll
    for (int k = 0; k < kGradientColumns; k++) {
      const int64_t row = first_row + own_row + r, column = first_column + own_column + k;
      if (row < of.rows && column < of.columns) of.gradient.put(row * of.columns + column, sum[r][k]);
    }
  }
}

// A block has some entries; their terms are shared among the threads.
template <typename T>
__device__ __forceinline__ void vector_gradient(const GradientOf<T>& of, int64_t block) {
  using A = acc_t<T>;
  SharedMemory shared;
  A* of_threads = shared.take<A>(kGradientThreads);
  const int64_t row = block * kGradientEntries + threadIdx.x % kGradientEntries;
  A sum = A(0);
  if (row < of.rows) {
    load_ahead<16>(
        threadIdx.x / kGradientEntries, of.terms, kGradientTerms, [&](int64_t n) { return of.left[n * of.left_stride + row]; },
        [&](int64_t, A term) { sum += term; });
  }
  of_threads[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kGradientEntries || row >= of.rows) return;
#pragma unroll
  for (int i = 1; i < kGradientTerms; i++) sum += of_threads[i * kGradientEntries + threadIdx.x];
  of.gradient.put(row, sum);
}

template <typename T>
__global__ void __launch_bounds__(kGradientThreads, kGradientBlocks<T>) parameter_gradients(GradientParams<T> params) {
  int i = 0;
  while (blockIdx.x >= params.of[i].end_block) i++;
  const GradientOf<T>& of = params.of[i];
  const int64_t block = blockIdx.x - of.first_block;
  if (of.columns > 0) {
    matrix_gradient(of, block);
  } else {
    vector_gradient(of, block);
  }
}

}  // namespace gcnet_ext::cuda
