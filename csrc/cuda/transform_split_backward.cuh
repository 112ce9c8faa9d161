// The backward pass of the transform in two launches, in which many blocks share the work of all samples (transform_split.cuh).
// With the symbols of transform_backward.cuh:
//
//   parts_q = w2[slice q, :]^T grad_t[slice q] or, without a w2, w1[slice q, :]^T grad_t[slice q]        transform_grad_parts
//   grad_activated = sum_q parts_q       grad_hidden = the gradient through the activation and the norm
//   grad_context = sum over branches of w1^T grad_hidden or, without a w2, of sum_q parts_q              transform_grad_context
//
// The rows of w2 are cut into the slices of the channels. A lane has two columns of a matrix, and the warps share its rows.
//
// What a block does in a launch is a function of its own, for as many samples as it has room for (kSamples), because an item of a
// ticketed launch (global_context_backward_tickets.cuh) is the same for one sample.
#pragma once

#include <algorithm>

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
  template <int kSamples>
  __device__ void multiply(const float* input, int rows, float (&sum)[kSamples][kSplitPair]) const {
#pragma unroll
    for (int u = 0; u < kSplitTogether; u++) {
      if (u * kSplitWarps >= rows) break;
      float weights[kSplitPair];
#pragma unroll
      for (int i = 0; i < kSplitPair; i++) weights[i] = weight_of(bits[u][i]);
      constexpr int V = std::min(kSamples, 4);
#pragma unroll
      for (int s = 0; s < kSamples; s += V) {
        const auto of_samples = *reinterpret_cast<const Vector<float, V>*>(input + u * kSplitWarps * kSamples + s);
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
template <int kSamples>
constexpr int kSumsOfWarps = kSplitWarps * kSamples * kSplitColumnTile;

template <int kSamples>
__device__ __forceinline__ void keep_sum_of_warp(const float (&sum)[kSamples][kSplitPair], float* of_warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int s = 0; s < kSamples; s++) {
#pragma unroll
    for (int i = 0; i < kSplitPair; i++) of_warps[(warp * kSamples + s) * kSplitColumnTile + lane + i * kWarp] = sum[s][i];
  }
}
// The sum of all warps, number i = sample * kSplitColumnTile + column.
template <int kSamples>
__device__ __forceinline__ float sum_of_warps(const float* of_warps, int i) {
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kSplitWarps; w++) total += of_warps[w * kSamples * kSplitColumnTile + i];
  return total;
}

// ---- the second layer, or the only one -----------------------------------------------------------------------------------------

template <int kSamples>
union GradPartsShared {
  alignas(16) float grad_t[kSliceChannels * kSamples];  // [channels of the slice, samples]
  float of_warps[kSumsOfWarps<kSamples>];
};

// wait() returns when grad_t has been written, and with it all that the call writes before grad_t.
template <int kSamples, typename T, typename Wait>
__device__ __forceinline__ void find_grad_parts(const TransformGradParams<T>& params, const SliceParts& parts,
                                                const SplitPlace& place, GradPartsShared<kSamples>& shared, const Wait& wait) {
  const BranchParams<T>& branch = params.forward.branch[place.branch];
  const bool two_layers = branch.w2.present();
  const Parameter<T>& matrix = two_layers ? branch.w2 : branch.w1;
  const int channels = static_cast<int>(params.forward.channels);
  const int columns = two_layers ? static_cast<int>(branch.units) : channels;
  const int first_row = place.slice * parts.slice_channels, left = channels - first_row;
  const int rows = left < parts.slice_channels ? left : parts.slice_channels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = place.tile * kSplitColumnTile + lane;
  WeightColumns<T> weights;
  weights.fetch(matrix, first_row + warp, first_row + rows, column, columns);
  wait();
  for (int i = threadIdx.x; i < place.samples * rows; i += kSplitThreads) {
    const int s = i / rows, row = i % rows;
    const float* const grad_t = params.grad_t[place.branch] + (place.first_sample + s) * channels + first_row;
    shared.grad_t[row * kSamples + s] = load_fresh(grad_t + row);
  }
  __syncthreads();
  float sum[kSamples][kSplitPair] = {};
#pragma unroll 1
  for (int first = warp; first < rows; first += kSplitRowStage) {
    if (first >= kSplitRowStage) weights.fetch(matrix, first_row + first, first_row + rows, column, columns);
    weights.multiply(shared.grad_t + first * kSamples, rows - first, sum);
  }
  __syncthreads();
  keep_sum_of_warp(sum, shared.of_warps);
  __syncthreads();
  for (int i = threadIdx.x; i < place.samples * kSplitColumnTile; i += kSplitThreads) {
    const int at = place.tile * kSplitColumnTile + i % kSplitColumnTile;
    if (at >= columns) continue;
    parts.of(place.first_sample + i / kSplitColumnTile, place.slice, place.branch)[at] =
        sum_of_warps<kSamples>(shared.of_warps, i);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    transform_grad_parts(TransformGradParams<T> params, SliceParts parts, SplitWork work) {
  let_next_launch_start();
  auto& shared = shared_memory<GradPartsShared<kSplitSamples>>();
  const SplitPlace place(work, params.forward.samples, blockIdx.x);
  find_grad_parts<kSplitSamples>(params, parts, place, shared, [] { wait_for_previous_launch(); });
}

// ---- the activation, the norm and the first layer ------------------------------------------------------------------------------

// `units` are those in front of a w2, of both branches, in whole vectors.
template <int kSamples>
struct GradContextShared {
  float* hidden;          // [samples, units]
  float* grad_activated;  // [samples, units]; then grad_z; then of_warps
  float* grad_hidden;     // [units, samples]

  __host__ __device__ GradContextShared(auto& memory, int64_t units) {
    memory.take(hidden, kSamples * units);
    memory.take(grad_activated, kSamples * units > kSumsOfWarps<kSamples> ? kSamples * units : kSumsOfWarps<kSamples>);
    memory.take(grad_hidden, kSamples * units);
  }
};

// Where the units of a branch begin in that shared memory, and how many there are.
struct GradContextUnits {
  int of_scale = 0, all = 0;

  template <typename T>
  __device__ explicit GradContextUnits(const TransformParams<T>& forward) {
    const BranchParams<T>&scale = forward.branch[kScale], &shift = forward.branch[kShift];
    of_scale = scale.w2.present() ? whole_vectors(scale.units) : 0;
    all = of_scale + (shift.w2.present() ? whole_vectors(shift.units) : 0);
  }
  __device__ int begin(int branch) const { return branch == kShift ? of_scale : 0; }
};

// wait() returns when the parts are there.
template <int kSamples, bool kReluOrSilu, typename T, typename Wait>
__device__ __forceinline__ void find_grad_context(const TransformGradParams<T>& params, const SliceParts& parts,
                                                  const SplitPlace& place, const GradContextUnits& units,
                                                  const GradContextShared<kSamples>& shared, const Wait& wait) {
  const TransformParams<T>& forward = params.forward;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = place.tile * kSplitColumnTile + lane;
  const int channels = static_cast<int>(forward.channels), all = units.all;
  const auto units_of = [&](int b) { return static_cast<int>(forward.branch[b].units); };

  WeightColumns<T> weights =
      {};  // without a value, its registers would not be free for the stages before, in a ticketed launch
  const int first_branch = forward.branch[kScale].w2.present() ? kScale : kShift;
  const bool any = all > 0;
  if (any) weights.fetch(forward.branch[first_branch].w1, warp, units_of(first_branch), column, channels);
  for (int b = 0; b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
    prefetch_vectors(branch, channels);
    for (int i = threadIdx.x; i < place.samples * units_of(b); i += kSplitThreads) {
      const int s = i / units_of(b), j = i % units_of(b);
      shared.hidden[s * all + units.begin(b) + j] =
          forward.hidden[(place.first_sample + s) * forward.units + branch.first_unit + j];
    }
  }
  wait();
  for (int b = 0; b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
    const int vectors = whole_vectors(branch.units) / kSplitColumns;
    for (int i = threadIdx.x; i < place.samples * vectors; i += kSplitThreads) {
      const int s = i / vectors, first = i % vectors * kSplitColumns;
      *reinterpret_cast<Vector<float, kSplitColumns>*>(shared.grad_activated + s * all + units.begin(b) + first) =
          parts.sum<kSplitColumns>(place.first_sample + s, b, first);
    }
  }
  __syncthreads();
  for (int i = warp; i < place.samples * kBranches; i += kSplitWarps) {
    const int s = i / kBranches, b = i % kBranches;
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
    const float* hidden = shared.hidden + s * all + units.begin(b);
    float* const grad_activated = shared.grad_activated + s * all + units.begin(b);
    activate_backward_by_warp<kReluOrSilu>(
        params, place.first_sample + s, branch, [&](int64_t j) { return hidden[j]; },
        [&](int64_t j) { return grad_activated[j]; }, grad_activated, /*keeps=*/place.tile == 0,
        [&](int64_t j, float grad) { shared.grad_hidden[(units.begin(b) + j) * kSamples + s] = grad; });
  }
  __syncthreads();
  float sum[kSamples][kSplitPair] = {};
  for (int b = first_branch; any && b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
#pragma unroll 1
    for (int first = warp; first < units_of(b); first += kSplitRowStage) {
      if (b != first_branch || first >= kSplitRowStage) weights.fetch(branch.w1, first, units_of(b), column, channels);
      weights.multiply(shared.grad_hidden + (units.begin(b) + first) * kSamples, units_of(b) - first, sum);
    }
  }
  keep_sum_of_warp(sum, shared.grad_activated);
  __syncthreads();
  for (int i = threadIdx.x; i < place.samples * kSplitColumnTile; i += kSplitThreads) {
    const int64_t sample = place.first_sample + i / kSplitColumnTile, at = place.tile * kSplitColumnTile + i % kSplitColumnTile;
    if (at >= channels) continue;
    float total = sum_of_warps<kSamples>(shared.grad_activated, i);
    for (int b = 0; b < kBranches; b++) {
      const BranchParams<T>& branch = forward.branch[b];
      if (branch.units > 0 && !branch.w2.present()) total += parts.sum<1>(sample, b, at).data[0];
    }
    params.grad_context[sample * channels + at] = total;
  }
}

template <typename T, bool kReluOrSilu>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    transform_grad_context(TransformGradParams<T> params, SliceParts parts, SplitWork work) {
  let_next_launch_start();
  const SplitPlace place(work, params.forward.samples, blockIdx.x);
  const GradContextUnits units(params.forward);
  const auto shared = shared_memory<GradContextShared<kSplitSamples>>(units.all);
  find_grad_context<kSplitSamples, kReluOrSilu>(params, parts, place, units, shared, [] { wait_for_previous_launch(); });
}

// ---- the launches ------------------------------------------------------------------------------------------------------------

// How these stages cut their work. The caller sets parts.values.
template <typename T>
struct TransformBackwardCut {
  SliceParts parts;
  SplitWork first, second;

  explicit TransformBackwardCut(const TransformParams<T>& forward)
      : parts(forward.channels, columns(forward, kScale), columns(forward, kShift)),
        first(forward.samples, parts.slices, tiles(columns(forward, kScale)), tiles(columns(forward, kShift)), false),
        second(forward.samples, /*slices=*/1, tiles(forward.channels), 0, /*in_turns=*/false) {}
  int64_t parts_of(int64_t samples) const { return samples * parts.slices * parts.width; }
  // Of one sample for each block.
  TransformBackwardCut of_samples() const {
    TransformBackwardCut cut = *this;
    cut.first.together = cut.second.together = 1;
    return cut;
  }

 private:
  static int64_t columns(const TransformParams<T>& forward, int b) {
    const BranchParams<T>& branch = forward.branch[b];
    return branch.w2.data ? branch.units : branch.units > 0 ? forward.channels : 0;
  }
  static int tiles(int64_t columns) { return split_tiles(columns, kSplitColumnTile); }
};

// Of the params, grad_activated and arrived are not needed.
template <typename T>
void launch_transform_backward_split(const TransformGradParams<T>& params, Workspace& workspace, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    const TransformParams<T>& forward = params.forward;
    const int64_t samples = forward.samples;
    if (samples == 0) return;
    TransformBackwardCut<T> cut(forward);
    cut.parts.values = workspace.take<float>(cut.parts_of(samples));
    launch_early(transform_grad_parts<T>, cut.first.grid(samples), dim3(kSplitThreads),
                 shared_bytes<GradPartsShared<kSplitSamples>>(), stream, params, cut.parts, cut.first);
    launch_early(forward.activation.is_relu_or_silu() ? transform_grad_context<T, true> : transform_grad_context<T, false>,
                 cut.second.grid(samples), dim3(kSplitThreads),
                 shared_bytes<GradContextShared<kSplitSamples>>(hidden_units(forward)), stream, params, cut.parts, cut.second);
  }
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_transform_backward_split)

}  // namespace gcnet_ext::cuda
