// The gradients of the parameters: sums over the samples of products of [N, ...] tensors, all of them in one launch.
//
//   of a matrix    grad[r, k] = sum_n left[n, r] right[n, k]
//   of a vector    grad[r] = sum_n left[n, r]
//
// n counts samples, or for the mask's weight the splits of all samples; the sums run over n in a fixed order.
#pragma once

#include "reduce.cuh"

namespace gcnet_ext::cuda {

constexpr int kGradientThreads = 256, kGradientWarps = kGradientThreads / kWarp;
constexpr int kGradientRows = 4;           // per warp
constexpr int kGradientColumns = 2;        // per lane
constexpr int kMostGradients = 2 * 6 + 1;  // both branches and the mask

template <typename T>
struct GradientOf {
  using A = acc_t<T>;
  const A* left = nullptr;                                                      // [terms, left_stride]
  const A* right = nullptr;                                                     // [terms, right_stride], for a matrix
  int64_t terms = 0, left_stride = 0, right_stride = 0, rows = 0, columns = 0;  // no columns: a vector
  MutableParameter<T> gradient;
  int64_t first_block = 0, end_block = 0;  // the blocks that work on it

  int64_t blocks() const {
    constexpr int64_t kRowTile = kGradientWarps * kGradientRows, kColumnTile = kWarp * kGradientColumns;
    if (columns == 0) return (rows + kWarp - 1) / kWarp;
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
  return shared_bytes<acc_t<T>>(kGradientThreads);
}

template <typename T>
__device__ __forceinline__ void matrix_gradient(const GradientOf<T>& of, int64_t block) {
  using A = acc_t<T>;
  constexpr int kColumnTile = kWarp * kGradientColumns;
  const int64_t column_tiles = (of.columns + kColumnTile - 1) / kColumnTile;
  const int64_t row = (block / column_tiles * kGradientWarps + threadIdx.x / kWarp) * kGradientRows;
  const int64_t column = block % column_tiles * kColumnTile + threadIdx.x % kWarp;
  A sum[kGradientRows][kGradientColumns];
#pragma unroll
  for (int r = 0; r < kGradientRows; r++) {
#pragma unroll
    for (int k = 0; k < kGradientColumns; k++) sum[r][k] = A(0);
  }
#pragma unroll 4
  for (int64_t n = 0; n < of.terms; n++) {
    A right[kGradientColumns];
#pragma unroll
    for (int k = 0; k < kGradientColumns; k++) {
      right[k] = column + k * kWarp < of.columns ? of.right[n * of.right_stride + column + k * kWarp] : A(0);
    }
#pragma unroll
    for (int r = 0; r < kGradientRows; r++) {
      const A left = row + r < of.rows ? of.left[n * of.left_stride + row + r] : A(0);
#pragma unroll
      for (int k = 0; k < kGradientColumns; k++) sum[r][k] += left * right[k];
    }
  }
#pragma unroll
  for (int r = 0; r < kGradientRows; r++) {
#pragma unroll
    for (int k = 0; k < kGradientColumns; k++) {
      if (row + r < of.rows && column + k * kWarp < of.columns)
        of.gradient.put((row + r) * of.columns + column + k * kWarp, sum[r][k]);
    }
  }
}

// A lane per row; the warps share the terms.
template <typename T>
__device__ __forceinline__ void vector_gradient(const GradientOf<T>& of, int64_t block) {
  using A = acc_t<T>;
  SharedMemory shared;
  A* of_warps = shared.take<A>(kGradientThreads);
  const int64_t row = block * kWarp + threadIdx.x % kWarp;
  A sum = A(0);
  if (row < of.rows) {
#pragma unroll 8
    for (int64_t n = threadIdx.x / kWarp; n < of.terms; n += kGradientWarps) sum += of.left[n * of.left_stride + row];
  }
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp || row >= of.rows) return;
#pragma unroll
  for (int w = 1; w < kGradientWarps; w++) sum += of_warps[w * kWarp + threadIdx.x];
  of.gradient.put(row, sum);
}

template <typename T>
__global__ void __launch_bounds__(kGradientThreads, 4) parameter_gradients(GradientParams<T> params) {
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
