// The transform and its backward pass for many samples at a time, for weights that one block would take too long to read. A
// block reads a piece of a matrix once for kBatchSamples samples. A sum runs over its terms in an order that depends on the
// matrix only, so that a sample gets the same bits in any batch.
#pragma once

#include "launch.h"
#include "transform_backward.cuh"

namespace gcnet_ext::cuda {

constexpr int kBatchThreads = 256, kBatchWarps = kBatchThreads / kWarp;
template <typename T>
constexpr int kBatchBlocks = sizeof(acc_t<T>) == sizeof(float) ? 2 : 1;  // on a multiprocessor: more would spill registers
constexpr int kBatchSamples = 8;
constexpr int kBatchRows = 2;             // of a matrix, per warp
constexpr int kBatchColumns = 2 * kWarp;  // of a transposed matrix, per block
constexpr int kBatchChunk = 128;          // rows of a transposed matrix, per block
// The terms of a sum that are staged in shared memory at a time: 16 KB for kBatchSamples samples.
template <typename A>
constexpr int kBatchStage = 2048 / static_cast<int>(sizeof(A));

constexpr int64_t batch_tiles(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }
// The pieces that a sum over the channels is cut into, so that there are enough blocks even for one tile of samples.
constexpr int64_t batch_chunks(int64_t channels) { return batch_tiles(channels, kBatchChunk); }

// The work of a block: a tile of samples, and a tile of the rows or columns of one of the branches.
struct BatchTile {
  int64_t first_sample, first;
  int branch;
  unsigned tiles;  // of rows or columns, of both branches

  __device__ BatchTile(int64_t tiles_of_scale, int64_t tiles_of_shift)
      : tiles(static_cast<unsigned>(tiles_of_scale + tiles_of_shift)) {
    const int64_t tile = blockIdx.x % tiles;
    first_sample = static_cast<int64_t>(blockIdx.x / tiles) * kBatchSamples;
    branch = tile < tiles_of_scale ? kScale : kShift;
    first = branch == kScale ? tile : tile - tiles_of_scale;
  }
};

// staged[s][i] = from(s, first + i), the term of sample first_sample + s, for i < width. Past the last sample or term there are
// zeros.
template <typename A, typename Load>
__device__ __forceinline__ void stage_samples(int64_t first_sample, int64_t samples, int64_t first, int64_t end, int width,
                                              const Load& from, A* staged) {
  for (int i = threadIdx.x; i < width; i += kBatchThreads) {
    A values[kBatchSamples];
#pragma unroll
    for (int s = 0; s < kBatchSamples; s++) {
      values[s] = A(0);
      if (first_sample + s < samples && first + i < end) values[s] = from(s, first + i);
    }
#pragma unroll
    for (int s = 0; s < kBatchSamples; s++) staged[s * kBatchStage<A> + i] = values[s];
  }
}

// A warp's rows of a matrix, as many columns as are staged, in registers. They are loaded before the warp waits for a barrier.
template <typename W, int kStage>
struct BatchRows {
  static constexpr int V = kMatrixVector, kSteps = kStage / (kWarp * V);
  Vector<W, V> values[kBatchRows][kSteps];

  __device__ void fetch(const W* matrix, int64_t first_row, int64_t rows, int64_t columns, int64_t first) {
#pragma unroll
    for (int r = 0; r < kBatchRows; r++) {
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int64_t k = first + (step * kWarp + threadIdx.x % kWarp) * V;
        values[r][step] = {};
        if (first_row + r < rows && k < columns) values[r][step] = load_vector<V>(matrix + (first_row + r) * columns + k);
      }
    }
  }

  // Adds the products with the staged samples to sum[r][s].
  template <typename A>
  __device__ void multiply(const A* staged, int width, A (&sum)[kBatchRows * kBatchSamples]) const {
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const int k = (step * kWarp + threadIdx.x % kWarp) * V;
      if (k >= width) break;
#pragma unroll
      for (int s = 0; s < kBatchSamples; s++) {
        const auto input = *reinterpret_cast<const Vector<A, V>*>(staged + s * kStage + k);
#pragma unroll
        for (int r = 0; r < kBatchRows; r++) {
#pragma unroll
          for (int j = 0; j < V; j++) {
            sum[r * kBatchSamples + s] += static_cast<A>(values[r][step].data[j]) * input.data[j];
          }
        }
      }
    }
  }
};

template <typename A>
struct TransformLayerShared {
  NormStatistics<A> statistics[kBatchSamples];
  A staged[kBatchSamples * kBatchStage<A>];
};

// Layer 0 is w1, and layer 1 is w2 with the norm and activation before it. A warp does kBatchRows rows at a time, `turns`
// times.
template <typename T, bool kReluOrSilu>
__global__ void __launch_bounds__(kBatchThreads, kBatchBlocks<T>)
    transform_layer(TransformParams<T> params, int layer, int64_t turns, int64_t tiles_of_scale, int64_t tiles_of_shift) {
  using A = acc_t<T>;
  constexpr int kStage = kBatchStage<A>;
  auto& shared = shared_memory<TransformLayerShared<A>>();
  const BatchTile tile(tiles_of_scale, tiles_of_shift);
  const BranchParams<T>& branch = params.branch[tile.branch];
  const Parameter<T>& matrix = layer == 0 ? branch.w1 : branch.w2;
  const Parameter<T>& bias = layer == 0 ? branch.b1 : branch.b2;
  const int64_t rows = layer == 0 ? branch.units : params.channels, columns = layer == 0 ? params.channels : branch.units;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto hidden_of = [&](int s) { return params.hidden + (tile.first_sample + s) * params.units + branch.first_unit; };
  if (layer == 1 && params.norm) {
    for (int s = warp; s < kBatchSamples && tile.first_sample + s < params.samples; s += kBatchWarps) {
      const A* hidden = hidden_of(s);
      const auto of_sample = statistics_by_warp(params, branch.units, [&](int64_t j) { return hidden[j]; });
      if (lane == 0) shared.statistics[s] = of_sample;
    }
  }
  const auto input = [&](int s, int64_t k) {
    if (layer == 0) return params.context[(tile.first_sample + s) * params.channels + k];
    return activate<kReluOrSilu>(params, branch, k, hidden_of(s)[k], params.norm ? shared.statistics[s] : NormStatistics<A>{});
  };

  for (int64_t turn = 0; turn < turns; turn++) {
    const int64_t first_row = ((tile.first * turns + turn) * kBatchWarps + warp) * kBatchRows;
    A sum[kBatchRows * kBatchSamples];
#pragma unroll
    for (int i = 0; i < kBatchRows * kBatchSamples; i++) sum[i] = A(0);
    for (int64_t first = 0; first < columns; first += kStage) {
      const bool staged_before = turn > 0 && columns <= kStage;
      const int64_t left = columns - first;
      const int width = left < kStage ? static_cast<int>(left + kMatrixVector - 1) / kMatrixVector * kMatrixVector : kStage;
      with_values(matrix, [&](const auto* values) {
        using W = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        BatchRows<W, kStage> of_warp;
        const bool vectors = vector_rows(values, columns);
        if (vectors) of_warp.fetch(values, first_row, rows, columns, first);
        if (!staged_before) {
          __syncthreads();  // no warp reads the terms before these any more
          stage_samples(tile.first_sample, params.samples, first, columns, width, input, shared.staged);
          __syncthreads();
        }
        if (vectors) return of_warp.multiply(shared.staged, width, sum);
        for (int k = lane; k < width && first + k < columns; k += kWarp) {
#pragma unroll
          for (int r = 0; r < kBatchRows; r++) {
            const A value = first_row + r < rows ? static_cast<A>(load(values + (first_row + r) * columns + first + k)) : A(0);
#pragma unroll
            for (int s = 0; s < kBatchSamples; s++) sum[r * kBatchSamples + s] += value * shared.staged[s * kStage + k];
          }
        }
      });
    }
    const Share share = transposed_sum<kBatchRows * kBatchSamples, 1, kWarp / 2>(sum, lane);
    const int64_t row = first_row + share.first / kBatchSamples, sample = tile.first_sample + share.first % kBatchSamples;
    if (!share.owner || row >= rows || sample >= params.samples) continue;
    const A value = sum[0] + bias.at_or(row, A(0));
    if (layer == 0) params.hidden[sample * params.units + branch.first_unit + row] = value;
    if (layer == 1 || !branch.w2.present()) params.put(tile.branch, sample, row, value);
  }
}

// Two launches, or one when no branch has a w2.
template <typename T>
void launch_transform(const TransformParams<T>& params, cudaStream_t stream) {
  constexpr int64_t kRows = kBatchWarps * kBatchRows;
  for (int layer = 0; layer < 2; layer++) {
    int64_t tiles[kBranches];
    for (int b = 0; b < kBranches; b++) {
      const BranchParams<T>& branch = params.branch[b];
      tiles[b] = layer == 0 ? batch_tiles(branch.units, kRows) : branch.w2.data ? batch_tiles(params.channels, kRows) : 0;
    }
    const int64_t sample_tiles = batch_tiles(params.samples, kBatchSamples), most = std::max(tiles[kScale], tiles[kShift]);
    if (most * sample_tiles == 0) continue;
    const int64_t branches = (tiles[kScale] > 0) + (tiles[kShift] > 0);
    const int64_t turns = plan_cuda_pieces(sample_tiles * branches, most, multiprocessors() * kBatchBlocks<T>);
    for (int64_t& of_branch : tiles) of_branch = batch_tiles(of_branch, turns);
    launch(params.activation.is_relu_or_silu() ? transform_layer<T, true> : transform_layer<T, false>,
           dim3(static_cast<unsigned>((tiles[kScale] + tiles[kShift]) * sample_tiles)), dim3(kBatchThreads),
           shared_bytes<TransformLayerShared<acc_t<T>>>(), stream, params, layer, turns, tiles[kScale], tiles[kShift]);
  }
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_transform)

template <typename A>
struct TransformBackwardLayerShared {
  unsigned word;  // of last_to_arrive
  union {
    alignas(16) A staged[kBatchSamples * kBatchStage<A>];
    A of_warps[kBatchWarps * kBatchSamples * kBatchColumns];  // when the sums are done
  };
};

// Layer 1 is the transpose of w2 with the activation and norm behind it: a block has a chunk of the channels, and the last
// block adds up the sums of the chunks. Layer 0 is the transpose of w1, and adds up both branches. A lane has two columns, and
// the warps share the rows.
template <typename T, bool kReluOrSilu>
__global__ void __launch_bounds__(kBatchThreads, kBatchBlocks<T>)
    transform_backward_layer(TransformGradParams<T> params, int layer, int64_t tiles_of_scale, int64_t tiles_of_shift) {
  using A = acc_t<T>;
  constexpr int kStage = kBatchStage<A>, kRowsTogether = 8;
  const TransformParams<T>& forward = params.forward;
  auto& shared = shared_memory<TransformBackwardLayerShared<A>>();
  const BatchTile tile(tiles_of_scale, tiles_of_shift);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t chunks = batch_chunks(forward.channels), chunk = layer == 0 ? 0 : tile.first % chunks;
  const int64_t first_column = (layer == 0 ? tile.first : tile.first / chunks) * kBatchColumns,
                columns = layer == 0 ? forward.channels : forward.branch[tile.branch].units;
  A sum[kBatchSamples][2];
#pragma unroll
  for (int s = 0; s < kBatchSamples; s++) sum[s][0] = sum[s][1] = A(0);

  for (int b = 0; b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (branch.units == 0 || (layer == 1 && b != tile.branch)) continue;
    const bool from_t = layer == 1 || !branch.w2.present();
    const A* input = from_t ? params.grad_t[b] : params.grad_hidden + branch.first_unit;
    const int64_t stride = from_t ? forward.channels : forward.units, all_rows = layer == 0 ? branch.units : forward.channels;
    const int64_t begin = chunk * kBatchChunk, end_of_chunk = begin + kBatchChunk;
    const int64_t rows = layer == 1 && end_of_chunk < all_rows ? end_of_chunk : all_rows;
    const auto from = [&](int s, int64_t row) { return input[(tile.first_sample + s) * stride + row]; };
    for (int64_t first = begin; first < rows; first += kStage) {
      const int64_t left = rows - first;
      const int width = left < kStage ? static_cast<int>(left) : kStage;
      stage_samples(tile.first_sample, forward.samples, first, rows, width, from, shared.staged);
      __syncthreads();
      with_values(layer == 0 ? branch.w1 : branch.w2, [&](const auto* values) {
        using W = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        load_ahead<kRowsTogether>(
            warp, width, kBatchWarps,
            [&](int64_t r) {
              Vector<W, 2> pair = {};
#pragma unroll
              for (int i = 0; i < 2; i++) {
                const int64_t column = first_column + lane + i * kWarp;
                if (column < columns) pair.data[i] = load(values + (first + r) * columns + column);
              }
              return pair;
            },
            [&](int64_t r, const Vector<W, 2>& pair) {
#pragma unroll
              for (int s = 0; s < kBatchSamples; s++) {
#pragma unroll
                for (int i = 0; i < 2; i++) sum[s][i] += static_cast<A>(pair.data[i]) * shared.staged[s * kStage + r];
              }
            });
      });
      __syncthreads();
    }
  }
#pragma unroll
  for (int s = 0; s < kBatchSamples; s++) {
#pragma unroll
    for (int i = 0; i < 2; i++) shared.of_warps[(warp * kBatchSamples + s) * kBatchColumns + lane + i * kWarp] = sum[s][i];
  }
  __syncthreads();
  const auto grad_activated = [&](int64_t sample, int64_t of_chunk) {
    return params.grad_activated + (sample * chunks + of_chunk) * forward.units;
  };
  for (int i = threadIdx.x; i < kBatchSamples * kBatchColumns; i += kBatchThreads) {
    const int64_t sample = tile.first_sample + i / kBatchColumns, column = first_column + i % kBatchColumns;
    A total = A(0);
#pragma unroll
    for (int w = 0; w < kBatchWarps; w++) total += shared.of_warps[w * kBatchSamples * kBatchColumns + i];
    if (sample >= forward.samples || column >= columns) continue;
    if (layer == 0) {
      params.grad_context[sample * forward.channels + column] = total;
    } else {
      grad_activated(sample, chunk)[forward.branch[tile.branch].first_unit + column] = total;
    }
  }
  if (layer == 0 || !last_to_arrive(params.arrived + tile.first_sample / kBatchSamples, tile.tiles, &shared.word)) return;
  for (int i = warp; i < kBatchSamples * kBranches; i += kBatchWarps) {
    const int64_t sample = tile.first_sample + i / kBranches;
    const BranchParams<T>& branch = forward.branch[i % kBranches];
    if (sample >= forward.samples || !branch.w2.present()) continue;
    const A* hidden = forward.hidden + sample * forward.units + branch.first_unit;
    const auto sum_of_chunks = [&](int64_t j) {
      A total = A(0);
      load_ahead<16>(
          0, chunks, 1, [&](int64_t of_chunk) { return load_fresh(grad_activated(sample, of_chunk) + branch.first_unit + j); },
          [&](int64_t, A part) { total += part; });
      return total;
    };
    activate_backward_by_warp<kReluOrSilu>(
        params, sample, branch, [&](int64_t j) { return hidden[j]; }, sum_of_chunks,
        params.grad_z + sample * forward.units + branch.first_unit, /*keeps=*/true, [](int64_t, A) {});
  }
}

// The counters, zero before the launch, of launch_transform_backward.
inline int64_t batch_counters(int64_t samples) { return batch_tiles(samples, kBatchSamples); }

template <typename T>
void launch_transform_backward(const TransformGradParams<T>& params, cudaStream_t stream) {
  const TransformParams<T>& forward = params.forward;
  for (int layer = 1; layer >= 0; layer--) {
    int64_t tiles[kBranches] = {layer == 0 ? batch_tiles(forward.channels, kBatchColumns) : 0, 0};
    for (int b = 0; b < kBranches && layer == 1; b++) {
      if (forward.branch[b].w2.data) {
        tiles[b] = batch_tiles(forward.branch[b].units, kBatchColumns) * batch_chunks(forward.channels);
      }
    }
    const int64_t blocks = (tiles[kScale] + tiles[kShift]) * batch_tiles(forward.samples, kBatchSamples);
    if (blocks == 0) continue;
    launch(forward.activation.is_relu_or_silu() ? transform_backward_layer<T, true> : transform_backward_layer<T, false>,
           dim3(static_cast<unsigned>(blocks)), dim3(kBatchThreads), shared_bytes<TransformBackwardLayerShared<acc_t<T>>>(),
           stream, params, layer, tiles[kScale], tiles[kShift]);
  }
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_transform_backward)

}  // namespace gcnet_ext::cuda
