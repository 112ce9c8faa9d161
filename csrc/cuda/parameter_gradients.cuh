// The gradients of the parameters: sums over the samples of products of [N, ...] tensors, all of them in one launch, or as the
// last items of a ticketed one (global_context_backward_tickets.cuh).
//
//   of a matrix    grad[r, k] = sum_n left[n, r] right[n, k]
//   of a vector    grad[r] = sum_n left[n, r]
//
// n counts samples, or for the mask's weight the splits of all samples; the sums run over n in a fixed order.
#pragma once

#include <algorithm>

#include "launch.h"
#include "parameter.cuh"
#include "reduce.cuh"
#include "shared_memory.cuh"

namespace gcnet_ext::cuda {

constexpr int kGradientThreads = 256, kGradientWarps = kGradientThreads / kWarp;
constexpr int kGradientRows = 2;     // of a matrix, per warp
constexpr int kGradientColumns = 4;  // of a matrix, per lane
constexpr int kGradientRowTile = kGradientWarps * kGradientRows, kGradientColumnTile = kWarp * kGradientColumns;
constexpr int kGradientStage = 32;                                   // terms of a matrix that are in shared memory at a time
constexpr int kGradientEntries = 8;                                  // of a vector, per block
constexpr int kGradientTerms = kGradientThreads / kGradientEntries;  // of each of them, at a time
template <typename T>
constexpr int kGradientBlocks = sizeof(acc_t<T>) == sizeof(float) ? 3 : 1;  // on a multiprocessor: more would spill registers
constexpr int kMostGradients = 2 * 6 + 2;                                   // six per branch, and the mask's two

// An entry for each term n, such as a sample: values[n * stride + i] for i < count.
template <typename A>
struct Terms {
  const A* values = nullptr;
  int64_t stride = 0, count = 0;
};

template <typename T>
struct ParameterGradient {
  using A = acc_t<T>;
  Terms<A> left, right;  // a vector has no right
  int64_t terms = 0;
  MutableParameter<T> gradient;
  bool of_previous_launch = true;          // whether the launch before this one, or the last stage of tickets, writes the terms
  int64_t first_block = 0, end_block = 0;  // the blocks that work on it

  int64_t blocks() const {
    constexpr int64_t kRowTile = kGradientRowTile, kColumnTile = kGradientColumnTile;
    if (right.count == 0) return (left.count + kGradientEntries - 1) / kGradientEntries;
    return (left.count + kRowTile - 1) / kRowTile * ((right.count + kColumnTile - 1) / kColumnTile);
  }
};

template <typename T>
struct GradientParams {
  ParameterGradient<T> gradients[kMostGradients];
  int count = 0;

  void add(ParameterGradient<T> gradient) {
    gradient.first_block = blocks();
    gradient.end_block = gradient.first_block + gradient.blocks();
    gradients[count++] = gradient;
  }
  // The gradient of the mask's bias, on which the result does not depend: a sum of no terms.
  void add_zero(const MutableParameter<T>& of_bias) {
    if (of_bias.data) add({.left = {.count = 1}, .right = {}, .gradient = of_bias});
  }
  __host__ __device__ int64_t blocks() const { return count ? gradients[count - 1].end_block : 0; }
  __device__ const ParameterGradient<T>& of_block(int64_t block) const {
    int i = 0;
    while (block >= gradients[i].end_block) i++;
    return gradients[i];
  }
};

// A term. kFresh: other blocks of this launch have written it.
template <bool kFresh, typename A>
__device__ __forceinline__ A load_term(const A* from) {
  if constexpr (kFresh) {
    return load_fresh(from);
  } else {
    return *from;
  }
}

// Loads a stage of terms, kWidth entries of each from number `first` on: thread t gets the entries t, t + kGradientThreads, ...
// Past the last term or entry there are zeros.
template <int kWidth, bool kFresh, typename A, int kCount>
__device__ __forceinline__ void load_stage(const Terms<A>& from, int64_t first_term, int64_t terms, int first,
                                           A (&values)[kCount]) {
  constexpr int kStep = kGradientThreads / kWidth;
  const int entry = first + static_cast<int>(threadIdx.x % kWidth);
  const int64_t end = entry < from.count ? terms : 0;
  int64_t n = first_term + threadIdx.x / kWidth;
  const A* next = from.values + n * from.stride + entry;
#pragma unroll
  for (int u = 0; u < kCount; u++, n += kStep, next += kStep * from.stride) {
    values[u] = A(0);
    if (n < end) values[u] = load_term<kFresh>(next);
  }
}

template <typename A>
struct MatrixGradientShared {
  A left[kGradientStage * kGradientRowTile];  // [terms, rows]
  A right[kGradientStage * kGradientColumnTile];
};

// A block has a tile of rows and columns: each of its warps has kGradientRows rows, and each lane kGradientColumns neighbours.
template <bool kFresh, typename T>
__device__ __forceinline__ void matrix_gradient(const ParameterGradient<T>& of, int64_t block,
                                                MatrixGradientShared<acc_t<T>>& shared) {
  using A = acc_t<T>;
  constexpr int kRows = kGradientRowTile, kColumns = kGradientColumnTile;
  constexpr int kOfLeft = kGradientStage * kRows / kGradientThreads, kOfRight = kGradientStage * kColumns / kGradientThreads;
  const int tile = static_cast<int>(block), column_tiles = static_cast<int>((of.right.count + kColumns - 1) / kColumns);
  const int first_row = tile / column_tiles * kRows, first_column = tile % column_tiles * kColumns;
  const int row_of_warp = threadIdx.x / kWarp * kGradientRows, column_of_lane = threadIdx.x % kWarp * kGradientColumns;
  A sum[kGradientRows][kGradientColumns] = {};
  for (int64_t first_term = 0; first_term < of.terms; first_term += kGradientStage) {
    A of_left[kOfLeft], of_right[kOfRight];
    load_stage<kRows, kFresh>(of.left, first_term, of.terms, first_row, of_left);
    load_stage<kColumns, kFresh>(of.right, first_term, of.terms, first_column, of_right);
    __syncthreads();  // no warp reads the stage before this one any more
#pragma unroll
    for (int u = 0; u < kOfLeft; u++) shared.left[u * kGradientThreads + threadIdx.x] = of_left[u];
#pragma unroll
    for (int u = 0; u < kOfRight; u++) shared.right[u * kGradientThreads + threadIdx.x] = of_right[u];
    __syncthreads();
#pragma unroll 4
    for (int n = 0; n < kGradientStage; n++) {
      const auto of_rows = *reinterpret_cast<const Vector<A, kGradientRows>*>(shared.left + n * kRows + row_of_warp);
      const auto of_columns =
          *reinterpret_cast<const Vector<A, kGradientColumns>*>(shared.right + n * kColumns + column_of_lane);
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
      const int row = first_row + row_of_warp + r, column = first_column + column_of_lane + k;
      if (row < of.left.count && column < of.right.count) of.gradient.put(row * of.right.count + column, sum[r][k]);
    }
  }
}

template <typename A>
struct VectorGradientShared {
  A of_threads[kGradientThreads];
};

// A block has kGradientEntries entries, and its threads share their terms.
template <bool kFresh, typename T>
__device__ __forceinline__ void vector_gradient(const ParameterGradient<T>& of, int64_t block,
                                                VectorGradientShared<acc_t<T>>& shared) {
  using A = acc_t<T>;
  const int64_t row = block * kGradientEntries + threadIdx.x % kGradientEntries;
  A sum = A(0);
  if (row < of.left.count) {
    load_ahead<16>(
        threadIdx.x / kGradientEntries, of.terms, kGradientTerms,
        [&](int64_t n) { return load_term<kFresh>(of.left.values + n * of.left.stride + row); },
        [&](int64_t, A term) { sum += term; });
  }
  shared.of_threads[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kGradientEntries || row >= of.left.count) return;
#pragma unroll
  for (int i = 1; i < kGradientTerms; i++) sum += shared.of_threads[i * kGradientEntries + threadIdx.x];
  of.gradient.put(row, sum);
}

template <typename T>
__global__ void __launch_bounds__(kGradientThreads, kGradientBlocks<T>) parameter_gradients(GradientParams<T> params) {
  using A = acc_t<T>;
  const ParameterGradient<T>& of = params.of_block(blockIdx.x);
  const int64_t block = blockIdx.x - of.first_block;
  if (of.of_previous_launch) wait_for_previous_launch();
  if (of.right.count > 0) {
    matrix_gradient</*kFresh=*/false>(of, block, shared_memory<MatrixGradientShared<A>>());
  } else {
    vector_gradient</*kFresh=*/false>(of, block, shared_memory<VectorGradientShared<A>>());
  }
  if (!of.of_previous_launch) wait_for_previous_launch();  // this launch is not over before that one
}

// early: the sums whose terms are there need not wait for the launch before this one.
template <typename T>
void launch_parameter_gradients(const GradientParams<T>& params, bool early, cudaStream_t stream) {
  if (params.count == 0) return;
  using A = acc_t<T>;
  const dim3 grid(static_cast<unsigned>(params.blocks())), block(kGradientThreads);
  const size_t shared = std::max(shared_bytes<MatrixGradientShared<A>>(), shared_bytes<VectorGradientShared<A>>());
  if (early) return launch_early(parameter_gradients<T>, grid, block, shared, stream, params);
  launch(parameter_gradients<T>, grid, block, shared, stream, params);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_parameter_gradients)

}  // namespace gcnet_ext::cuda
