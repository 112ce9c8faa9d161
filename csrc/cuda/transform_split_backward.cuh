// The backward pass of the transform in two launches, in which many blocks share the work of all samples (transform_split.cuh).
// With the symbols of transform_backward.cuh:
//
//   parts_q = w2[slice q, :]^T grad_t[slice q] or, without a w2, w1[slice q, :]^T grad_t[slice q]        transform_grad_parts
//   grad_activated = sum_q parts_q       grad_hidden = the gradient through the activation and the norm
//   grad_context = sum over branches of w1^T grad_hidden or, without a w2, of sum_q parts_q              transform_grad_context
//
// The rows of w2 are cut into the slices of the channels. A lane has two columns of a matrix, and the warps share its rows.
#pragma once

#include "transform_backward.cuh"
#include "transform_split.cuh"

namespace gcnet_ext::cuda {

constexpr int kSplitPair = 2;                         // columns of a lane, kWarp apart
constexpr int kSplitColumnTile = kSplitPair * kWarp;  // of a block
constexpr int kSplitTogether = 16;                    // rows of a warp that are under way together
constexpr int kSplitRowStage = kSplitWarps * kSplitTogether;

// kSplitTogether rows of the columns of a lane, as they lie in memory, so that nothing waits for them yet.
template <typename T>
struct WeightColumns {
  unsigned bits[kSplitTogether][kSplitPair];
  bool is_float32 = false;

  // The rows first, first + kSplitWarps, ... below `rows`.
  __device__ void fetch(const Parameter<T>& matrix, int first, int rows, int first_column, int columns) {
    is_float32 = sizeof(T) == sizeof(float) || matrix.is_float32;
    with_values(matrix, [&](const auto* values) {
#pragma unroll
      for (int u = 0; u < kSplitTogether; u++) {
        const int row = first + u * kSplitWarps;
#pragma unroll
        for (int i = 0; i < kSplitPair; i++) {
          const int column = first_column + i * kWarp;
          bits[u][i] = row < rows && column < columns ? bits_of_weight(load(values + row * columns + column)) : 0u;
        }
      }
    });
  }
  // Adds the products with input [row, sample], whose first row is that of this warp; `rows` of them are there.
  __device__ void multiply(const float* input, int rows, float (&sum)[kSplitSamples][kSplitPair]) const {
#pragma unroll
    for (int u = 0; u < kSplitTogether; u++) {
      if (u * kSplitWarps >= rows) break;
      float weights[kSplitPair];
#pragma unroll
      for (int i = 0; i < kSplitPair; i++) weights[i] = weight_of(bits[u][i]);
      constexpr int V = 4;
#pragma unroll
      for (int s = 0; s < kSplitSamples; s += V) {
        const auto of_samples = *reinterpret_cast<const Vector<float, V>*>(input + u * kSplitWarps * kSplitSamples + s);
#pragma unroll
        for (int j = 0; j < V; j++) {
#pragma unroll
          for (int i = 0; i < kSplitPair; i++) sum[s + j][i] += weights[i] * of_samples.data[j];
        }
      }
    }
  }

 private:
  __device__ static unsigned bits_of_weight(float weight) { return __builtin_bit_cast(unsigned, weight); }
  template <typename W>
  __device__ static unsigned bits_of_weight(W weight) {
    return __builtin_bit_cast(unsigned short, weight);
  }
  __device__ float weight_of(unsigned kept) const {
    if constexpr (sizeof(T) == sizeof(short)) {
      if (!is_float32) return widen(__builtin_bit_cast(T, static_cast<unsigned short>(kept)));
    }
    return __builtin_bit_cast(float, kept);
  }
};

// The sums of the warps of a block, [warps, samples, columns].
constexpr int kSumsOfWarps = kSplitWarps * kSplitSamples * kSplitColumnTile;

__device__ __forceinline__ void keep_sum_of_warp(const float (&sum)[kSplitSamples][kSplitPair], float* of_warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int s = 0; s < kSplitSamples; s++) {
#pragma unroll
    for (int i = 0; i < kSplitPair; i++) of_warps[(warp * kSplitSamples + s) * kSplitColumnTile + lane + i * kWarp] = sum[s][i];
  }
}
// The sum of all warps, number i = sample * kSplitColumnTile + column.
__device__ __forceinline__ float sum_of_warps(const float* of_warps, int i) {
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kSplitWarps; w++) total += of_warps[w * kSplitSamples * kSplitColumnTile + i];
  return total;
}

// ---- the second layer, or the only one -----------------------------------------------------------------------------------------

union GradPartsShared {
  alignas(16) float grad_t[kSliceChannels * kSplitSamples];  // [channels of the slice, samples]
  float of_warps[kSumsOfWarps];
};

template <typename T>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    transform_grad_parts(TransformGradParams<T> params, SliceParts parts, SplitWork work) {
  let_next_launch_start();
  const TransformParams<T>& forward = params.forward;
  auto& shared = shared_memory<GradPartsShared>();
  const SplitPlace place(work, forward.samples, blockIdx.x);
  const BranchParams<T>& branch = forward.branch[place.branch];
  const bool two_layers = branch.w2.present();
  const Parameter<T>& matrix = two_layers ? branch.w2 : branch.w1;
  const int channels = static_cast<int>(forward.channels), columns = two_layers ? static_cast<int>(branch.units) : channels;
  const int first_row = place.slice * parts.slice_channels, left = channels - first_row;
  const int rows = left < parts.slice_channels ? left : parts.slice_channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = place.tile * kSplitColumnTile + lane;
  WeightColumns<T> weights;
  weights.fetch(matrix, first_row + warp, first_row + rows, column, columns);
  wait_for_previous_launch();
  for (int i = threadIdx.x; i < place.samples * rows; i += kSplitThreads) {
    const int s = i / rows, row = i % rows;
    const float* const grad_t = params.grad_t[place.branch] + (place.first_sample + s) * channels + first_row;
    shared.grad_t[row * kSplitSamples + s] = load_fresh(grad_t + row);
  }
  __syncthreads();
  float sum[kSplitSamples][kSplitPair] = {};
#pragma unroll 1
  for (int first = warp; first < rows; first += kSplitRowStage) {
    if (first >= kSplitRowStage) weights.fetch(matrix, first_row + first, first_row + rows, column, columns);
    weights.multiply(shared.grad_t + first * kSplitSamples, rows - first, sum);
  }
  __syncthreads();
  keep_sum_of_warp(sum, shared.of_warps);
  __syncthreads();
  for (int i = threadIdx.x; i < place.samples * kSplitColumnTile; i += kSplitThreads) {
    const int at = place.tile * kSplitColumnTile + i % kSplitColumnTile;
    if (at >= columns) continue;
    parts.of(place.first_sample + i / kSplitColumnTile, place.slice, place.branch)[at] = sum_of_warps(shared.of_warps, i);
  }
}

// ---- the activation, the norm and the first layer ------------------------------------------------------------------------------

// `units` are those in front of a w2, of both branches, in whole vectors.
struct GradContextShared {
  float* hidden;          // [samples, units]
  float* grad_activated;  // [samples, units]; then grad_z; then of_warps
  float* grad_hidden;     // [units, samples]

  __host__ __device__ GradContextShared(auto& memory, int64_t units) {
    memory.take(hidden, kSplitSamples * units);
    memory.take(grad_activated, kSplitSamples * units > kSumsOfWarps ? kSplitSamples * units : kSumsOfWarps);
    memory.take(grad_hidden, kSplitSamples * units);
  }
};

template <typename T, bool kReluOrSilu>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    transform_grad_context(TransformGradParams<T> params, SliceParts parts, SplitWork work) {
  let_next_launch_start();
  const TransformParams<T>& forward = params.forward;
  const SplitPlace place(work, forward.samples, blockIdx.x);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = place.tile * kSplitColumnTile + lane;
  const int channels = static_cast<int>(forward.channels);
  const auto units_of = [&](int b) { return static_cast<int>(forward.branch[b].units); };
  // Where the units of a branch begin in shared memory.
  const bool scale_is_there = forward.branch[kScale].w2.present();
  const int of_scale = scale_is_there ? whole_vectors(units_of(kScale)) : 0;
  const int all = of_scale + (forward.branch[kShift].w2.present() ? whole_vectors(units_of(kShift)) : 0);
  const auto begin = [&](int b) { return b == kShift ? of_scale : 0; };
  const auto shared = shared_memory<GradContextShared>(all);

  WeightColumns<T> weights;
  const int first_branch = scale_is_there ? kScale : kShift;
  const bool any = all > 0;
  if (any) weights.fetch(forward.branch[first_branch].w1, warp, units_of(first_branch), column, channels);
  for (int b = 0; b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
    prefetch_vectors(branch, channels);
    for (int i = threadIdx.x; i < place.samples * units_of(b); i += kSplitThreads) {
      const int s = i / units_of(b), j = i % units_of(b);
      shared.hidden[s * all + begin(b) + j] = forward.hidden[(place.first_sample + s) * forward.units + branch.first_unit + j];
    }
  }
  wait_for_previous_launch();
  for (int b = 0; b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
    const int vectors = whole_vectors(branch.units) / kSplitColumns;
    for (int i = threadIdx.x; i < place.samples * vectors; i += kSplitThreads) {
      const int s = i / vectors, first = i % vectors * kSplitColumns;
      *reinterpret_cast<Vector<float, kSplitColumns>*>(shared.grad_activated + s * all + begin(b) + first) =
          parts.sum<kSplitColumns>(place.first_sample + s, b, first);
    }
  }
  __syncthreads();
  for (int i = warp; i < place.samples * kBranches; i += kSplitWarps) {
    const int s = i / kBranches, b = i % kBranches;
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
    const float* hidden = shared.hidden + s * all + begin(b);
    float* const grad_activated = shared.grad_activated + s * all + begin(b);
    activate_backward_by_warp<kReluOrSilu>(
        params, place.first_sample + s, branch, [&](int64_t j) { return hidden[j]; },
        [&](int64_t j) { return grad_activated[j]; }, grad_activated, /*keeps=*/place.tile == 0,
        [&](int64_t j, float grad) { shared.grad_hidden[(begin(b) + j) * kSplitSamples + s] = grad; });
  }
  __syncthreads();
  float sum[kSplitSamples][kSplitPair] = {};
  for (int b = first_branch; any && b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
#pragma unroll 1
    for (int first = warp; first < units_of(b); first += kSplitRowStage) {
      if (b != first_branch || first >= kSplitRowStage) weights.fetch(branch.w1, first, units_of(b), column, channels);
      weights.multiply(shared.grad_hidden + (begin(b) + first) * kSplitSamples, units_of(b) - first, sum);
    }
  }
  keep_sum_of_warp(sum, shared.grad_activated);
  __syncthreads();
  for (int i = threadIdx.x; i < place.samples * kSplitColumnTile; i += kSplitThreads) {
    const int64_t sample = place.first_sample + i / kSplitColumnTile, at = place.tile * kSplitColumnTile + i % kSplitColumnTile;
    if (at >= channels) continue;
    float total = sum_of_warps(shared.grad_activated, i);
    for (int b = 0; b < kBranches; b++) {
      const BranchParams<T>& branch = forward.branch[b];
      if (branch.units > 0 && !branch.w2.present()) total += parts.sum<1>(sample, b, at).data[0];
    }
    params.grad_context[sample * channels + at] = total;
  }
}

// ---- the launches ------------------------------------------------------------------------------------------------------------

// Of the params, grad_activated and arrived are not needed.
template <typename T>
void launch_transform_backward_split(const TransformGradParams<T>& params, Workspace& workspace, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    const TransformParams<T>& forward = params.forward;
    const int64_t samples = forward.samples, channels = forward.channels;
    if (samples == 0) return;
    int64_t columns[kBranches];
    for (int b = 0; b < kBranches; b++) {
      const BranchParams<T>& branch = forward.branch[b];
      columns[b] = branch.w2.data ? branch.units : branch.units > 0 ? channels : 0;
    }
    SliceParts parts(channels, columns[kScale], columns[kShift]);
    parts.values = workspace.take<float>(samples * parts.slices * parts.width);
    const SplitWork first(samples, parts.slices, split_tiles(columns[kScale], kSplitColumnTile),
                          split_tiles(columns[kShift], kSplitColumnTile), /*in_turns=*/false);
    launch_early(transform_grad_parts<T>, first.grid(samples), dim3(kSplitThreads), shared_bytes<GradPartsShared>(), stream,
                 params, parts, first);
    const SplitWork second(samples, /*slices=*/1, split_tiles(channels, kSplitColumnTile), 0, /*in_turns=*/false);
    launch_early(forward.activation.is_relu_or_silu() ? transform_grad_context<T, true> : transform_grad_context<T, false>,
                 second.grid(samples), dim3(kSplitThreads), shared_bytes<GradContextShared>(hidden_units(forward)), stream,
                 params, parts, second);
  }
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_transform_backward_split)

}  // namespace gcnet_ext::cuda
