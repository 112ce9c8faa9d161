// The transform and its backward pass for many samples at a time, for weights that one block should not read alone. Every block
// reads a piece of a matrix once for kBatchSamples samples. A sum runs over its terms in an order that depends on the matrix
// only, so that a sample gets the same bits in any batch.
#pragma once

#include "transform_backward.cuh"

namespace gcnet_ext::cuda {

constexpr int kBatchThreads = 256, kBatchWarps = kBatchThreads / kWarp;
template <typename T>
constexpr int kBatchBlocks = sizeof(acc_t<T>) == sizeof(float) ? 2 : 1;  // on a multiprocessor: enough registers for no spills
constexpr int kBatchSamples = 8;
constexpr int kBatchRows = 2;             // of a matrix, per warp
constexpr int kBatchStage = 256;          // terms of a sum that are staged in shared memory at a time
constexpr int kBatchColumns = 2 * kWarp;  // of a transposed matrix, per block

constexpr int64_t batch_tiles(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// Calls body with the values of a matrix in their own type.
template <typename T, typename Body>
__device__ __forceinline__ void with_values(const Parameter<T>& matrix, const Body& body) {
  if (matrix.single) {
    body(static_cast<const float*>(matrix.data));
  } else {
    body(static_cast<const T*>(matrix.data));
  }
}

// The work of a block: a tile of samples, and a tile of the rows or columns of one of the branches.
struct BatchTile {
  int64_t first_sample, first;
  int branch;
  unsigned tiles;  // of a tile of samples, all branches together

  __device__ BatchTile(int64_t tiles_of_scale, int64_t tiles_of_shift)
      : tiles(static_cast<unsigned>(tiles_of_scale + tiles_of_shift)) {
    const int64_t tile = blockIdx.x % tiles;
    first_sample = static_cast<int64_t>(blockIdx.x / tiles) * kBatchSamples;
    branch = tile < tiles_of_scale ? kScale : kShift;
    first = branch == kScale ? tile : tile - tiles_of_scale;
  }
};

// staged[s][i] = from[(first_sample + s)*stride + first + i], and zeros where there is nothing.
template <typename A>
__device__ __forceinline__ void stage_samples(const A* from, int64_t stride, int64_t first_sample, int64_t samples,
                                              int64_t first, int64_t end, A* staged) {
  for (int i = threadIdx.x; i < kBatchSamples * kBatchStage; i += kBatchThreads) {
    const int64_t sample = first_sample + i / kBatchStage, term = first + i % kBatchStage;
    staged[i] = sample < samples && term < end ? from[sample * stride + term] : A(0);
  }
}

// Four neighbours of a row, zeros past its end.
template <typename A, typename W>
__device__ __forceinline__ void load_four(const W* row, int64_t k, int64_t columns, bool whole, A (&four)[kMatrixVector]) {
  Vector<W, kMatrixVector> values = {};
  if (whole) {
    if (k < columns) values = load_vector<kMatrixVector>(row + k);
  } else {
#pragma unroll
    for (int i = 0; i < kMatrixVector; i++) {
      if (k + i < columns) values.data[i] = load(row + k + i);
    }
  }
#pragma unroll
  for (int i = 0; i < kMatrixVector; i++) four[i] = static_cast<A>(values.data[i]);
}

template <typename T>
size_t layer_shared_bytes() {
  return shared_bytes<unsigned>(1) + shared_bytes<acc_t<T>>(kBatchSamples * kBatchStage);
}

// Layer 0 is w1 with the norm and activation behind it, layer 1 is w2. A warp has kBatchRows rows.
template <typename T>
__global__ void __launch_bounds__(kBatchThreads, kBatchBlocks<T>)
    transform_layer(TransformParams<T> params, int layer, int64_t tiles_of_scale, int64_t tiles_of_shift) {
  using A = acc_t<T>;
  SharedMemory shared;
  unsigned* word = shared.take<unsigned>(1);
  A* staged = shared.take<A>(kBatchSamples * kBatchStage);
  const BatchTile tile(tiles_of_scale, tiles_of_shift);
  const BranchParams<T>& branch = params.branch[tile.branch];
  const Parameter<T>& matrix = layer == 0 ? branch.w1 : branch.w2;
  const Parameter<T>& bias = layer == 0 ? branch.b1 : branch.b2;
  const A* input = layer == 0 ? params.context : params.activated + branch.first_unit;
  const int64_t rows = layer == 0 ? branch.units : params.channels, columns = layer == 0 ? params.channels : branch.units;
  const int64_t stride = layer == 0 ? params.channels : params.units;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_row = (tile.first * kBatchWarps + warp) * kBatchRows;

  A sum[kBatchRows * kBatchSamples];
#pragma unroll
  for (int i = 0; i < kBatchRows * kBatchSamples; i++) sum[i] = A(0);
  for (int64_t first = 0; first < columns; first += kBatchStage) {
    stage_samples(input, stride, tile.first_sample, params.samples, first, columns, staged);
    __syncthreads();
    with_values(matrix, [&](const auto* values) {
      const bool whole = vector_rows(values, columns);
      for (int k = lane * kMatrixVector; k < kBatchStage; k += kWarp * kMatrixVector) {
#pragma unroll
        for (int r = 0; r < kBatchRows; r++) {
          if (first_row + r >= rows) break;
          A four[kMatrixVector];
          load_four(values + (first_row + r) * columns, first + k, columns, whole, four);
#pragma unroll
          for (int s = 0; s < kBatchSamples; s++) {
#pragma unroll
            for (int i = 0; i < kMatrixVector; i++) sum[r * kBatchSamples + s] += four[i] * staged[s * kBatchStage + k + i];
          }
        }
      }
    });
    __syncthreads();
  }
  const Share share = transposed_sum<kBatchRows * kBatchSamples, 1, kWarp / 2>(sum, lane);
  const int64_t row = first_row + share.first / kBatchSamples, sample = tile.first_sample + share.first % kBatchSamples;
  if (share.owner && row < rows && sample < params.samples) {
    const A value = sum[0] + bias.at_or(row, A(0));
    if (layer == 0) params.hidden[sample * params.units + branch.first_unit + row] = value;
    if (layer == 1 || !branch.w2.given()) params.put(tile.branch, sample, row, value);
  }
  if (layer == 1 || !last_to_arrive(params.arrived + tile.first_sample / kBatchSamples, tile.tiles, word)) return;
  for (int i = warp; i < kBatchSamples * kBranches; i += kBatchWarps) {
    const int64_t of_warp = tile.first_sample + i / kBranches;
    const BranchParams<T>& its_branch = params.branch[i % kBranches];
    if (of_warp >= params.samples || !its_branch.w2.given()) continue;
    const int64_t first = of_warp * params.units + its_branch.first_unit;
    activate_by_warp(
        params, its_branch, [&](int64_t j) { return load_fresh(params.hidden + first + j); }, params.activated + first);
  }
}

template <typename T>
size_t backward_layer_shared_bytes() {
  using A = acc_t<T>;
  return shared_bytes<unsigned>(1) +
         std::max(shared_bytes<A>(kBatchSamples * kBatchStage), shared_bytes<A>(kBatchWarps * kBatchSamples * kBatchColumns));
}

// Layer 1 is the transpose of w2 with the activation and norm behind it, layer 0 the transpose of w1, both branches added up. A
// lane has two columns; the warps share the rows.
template <typename T>
__global__ void __launch_bounds__(kBatchThreads, kBatchBlocks<T>)
    transform_backward_layer(TransformGradParams<T> params, int layer, int64_t tiles_of_scale, int64_t tiles_of_shift) {
  using A = acc_t<T>;
  const TransformParams<T>& forward = params.forward;
  SharedMemory shared;
  unsigned* word = shared.take<unsigned>(1);
  A* staged = shared.take<A>(kBatchSamples * kBatchStage);
  A* of_warps = staged;  // [warps][samples][columns], when the sums are done
  const BatchTile tile(tiles_of_scale, tiles_of_shift);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_column = tile.first * kBatchColumns,
                columns = layer == 0 ? forward.channels : forward.branch[tile.branch].units;
  A sum[kBatchSamples][2];
#pragma unroll
  for (int s = 0; s < kBatchSamples; s++) sum[s][0] = sum[s][1] = A(0);

  for (int b = 0; b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (branch.units == 0 || (layer == 1 && b != tile.branch)) continue;
    const bool from_t = layer == 1 || !branch.w2.given();
    const A* input = from_t ? params.grad_t[b] : params.grad_hidden + branch.first_unit;
    const int64_t stride = from_t ? forward.channels : forward.units, rows = layer == 0 ? branch.units : forward.channels;
    for (int64_t first = 0; first < rows; first += kBatchStage) {
      stage_samples(input, stride, tile.first_sample, forward.samples, first, rows, staged);
      __syncthreads();
      with_values(layer == 0 ? branch.w1 : branch.w2, [&](const auto* values) {
#pragma unroll 4
        for (int r = warp; r < kBatchStage; r += kBatchWarps) {
          if (first + r >= rows) break;
          const auto* row = values + (first + r) * columns;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int64_t column = first_column + lane + i * kWarp;
            const A value = column < columns ? static_cast<A>(load(row + column)) : A(0);
#pragma unroll
            for (int s = 0; s < kBatchSamples; s++) sum[s][i] += value * staged[s * kBatchStage + r];
          }
        }
      });
      __syncthreads();
    }
  }
#pragma unroll
  for (int s = 0; s < kBatchSamples; s++) {
#pragma unroll
    for (int i = 0; i < 2; i++) of_warps[(warp * kBatchSamples + s) * kBatchColumns + lane + i * kWarp] = sum[s][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBatchSamples * kBatchColumns; i += kBatchThreads) {
    const int64_t sample = tile.first_sample + i / kBatchColumns, column = first_column + i % kBatchColumns;
    A total = A(0);
#pragma unroll
    for (int w = 0; w < kBatchWarps; w++) total += of_warps[w * kBatchSamples * kBatchColumns + i];
    if (sample >= forward.samples || column >= columns) continue;
    if (layer == 0) {
      params.grad_context[sample * forward.channels + column] = total * params.grad_context_factor;
    } else {
      params.grad_activated[sample * forward.units + forward.branch[tile.branch].first_unit + column] = total;
    }
  }
  if (layer == 0 || !last_to_arrive(params.arrived + tile.first_sample / kBatchSamples, tile.tiles, word)) return;
  for (int i = warp; i < kBatchSamples * kBranches; i += kBatchWarps) {
    const int64_t sample = tile.first_sample + i / kBranches;
    const BranchParams<T>& branch = forward.branch[i % kBranches];
    if (sample >= forward.samples || !branch.w2.given()) continue;
    const int64_t first = sample * forward.units + branch.first_unit;
    activate_backward_by_warp(
        params, sample, branch, [&](int64_t j) { return forward.hidden[first + j]; },
        [&](int64_t j) { return load_fresh(params.grad_activated + first + j); }, [](int64_t, A) {});
  }
}

}  // namespace gcnet_ext::cuda
