// The transform in two launches, in which many blocks share the work of all samples. With the symbols of transform.cuh:
//
//   parts_q = w1[:, slice q] context[slice q]          hidden = sum_q parts_q + b1             transform_hidden_parts
//   t = w2 act(norm(hidden)) + b2 or, without a w2, t = hidden                                 transform_outputs
//
// A slice is a range of the channels (plan_cuda_transform_slices). The first launch also ends the attention pool: a block
// merges the splits of its slice of the context and writes its share of the attention. Both launches load weights before they
// wait for the launch before them. The order of every sum depends on the shape alone, so that neither the samples that a block
// works on together nor the rows that it takes one after the other change a bit.
#pragma once

#include "context_slice.cuh"

namespace gcnet_ext::cuda {

// ---- the context, the attention and the first layer --------------------------------------------------------------------------

// The work of one place: a tile of the hidden units of a branch. wait() waits for the pool.
template <int kSamples, typename T, typename Wait>
__device__ __forceinline__ void find_hidden_parts(const PoolParams<T>& params, const SliceParts& parts, const SplitWork& work,
                                                  const SplitPlace& place, ContextSlice<kSamples>& shared, const Wait& wait) {
  const TransformParams<T>& transform = params.transform;
  const BranchParams<T>& branch = transform.branch[place.branch];
  const int channels = static_cast<int>(transform.channels), first_channel = place.slice * parts.slice_channels;
  const int left = channels - first_channel, width = left < parts.slice_channels ? left : parts.slice_channels;
  const WeightSlice<T> slice{branch.w1, static_cast<int>(branch.units), channels, first_channel, width};
  WeightRows<T> weights(place);
  weights.fetch(slice, place.first_row(work, 0), 0);
  slice.prefetch_later(place, work);
  wait();
  if (params.partial) {
    find_factors(params, place, shared);
    __syncthreads();
    // The first of the blocks that have this slice writes it.
    const bool stores = place.share == place.slice * work.tiles_of_both();
    merge_slice(params, place, first_channel, width, stores, shared);
  } else {
    load_context(params, place, first_channel, width, shared);
  }
  __syncthreads();
  multiply_rows<kSamples>(
      slice, weights, place, work, shared.context, kSliceChannels,
      [&](int row, int64_t sample, float value) { parts.of(sample, place.slice, place.branch)[row] = value; });
  if (params.partial && params.attention) write_attention(params, place, work.places(), shared);
}

template <typename T>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    transform_hidden_parts(PoolParams<T> params, SliceParts parts, SplitWork work) {
  let_next_launch_start();
  find_hidden_parts(params, parts, work, SplitPlace(work, params.transform.samples, blockIdx.x),
                    shared_memory<ContextSlice<kSplitSamples>>(), [] { wait_for_previous_launch(); });
}

// ---- the second layer --------------------------------------------------------------------------------------------------------

struct TransformOutputsShared {
  float* hidden;  // [samples, units], units in whole vectors; then act(norm(hidden))

  __host__ __device__ TransformOutputsShared(auto& memory, int64_t units) {
    memory.take(hidden, kSplitSamples * whole_vectors(units));
  }
};

// Without a w2, the rows of this block are hidden units and outputs at once.
template <typename T>
__device__ void put_hidden(const TransformParams<T>& params, const SliceParts& parts, const SplitPlace& place,
                           const SplitWork& work) {
  const BranchParams<T>& branch = params.branch[place.branch];
  const int rows = work.turns * kSplitRowTile, first_row = place.tile * rows;
  for (int i = threadIdx.x; i < place.samples * rows; i += kSplitThreads) {
    const int64_t sample = place.first_sample + i / rows;
    const int row = first_row + i % rows;
    if (row >= params.channels) continue;
    const float value = parts.sum<1>(sample, place.branch, row).data[0] + branch.b1.at_or(row, 0.f);
    params.hidden[sample * params.units + branch.first_unit + row] = value;
    params.put(place.branch, sample, row, value);
  }
}

// The work of one place: a tile of the outputs of a branch. shared_hidden [kSamples, units], units in whole vectors. wait()
// waits for the hidden parts.
template <int kSamples, bool kReluOrSilu, typename T, typename Wait>
__device__ __forceinline__ void find_outputs(const TransformParams<T>& params, const SliceParts& parts, const SplitWork& work,
                                             const SplitPlace& place, float* shared_hidden, const Wait& wait) {
  const BranchParams<T>& branch = params.branch[place.branch];
  prefetch_vectors(branch, params.channels);
  if (!branch.w2.present()) {
    wait();
    return put_hidden(params, parts, place, work);
  }
  const int units = static_cast<int>(branch.units), stride = whole_vectors(units), vectors = stride / kSplitColumns;
  const WeightSlice<T> all{branch.w2, static_cast<int>(params.channels), units, /*begin=*/0, units};
  WeightRows<T> weights(place);
  weights.fetch(all, place.first_row(work, 0), 0);
  all.prefetch_later(place, work);
  wait();
  for (int i = threadIdx.x; i < place.samples * vectors; i += kSplitThreads) {
    const int s = i / vectors, first = i % vectors * kSplitColumns;
    const int64_t sample = place.first_sample + s;
    const auto sum = parts.sum<kSplitColumns>(sample, place.branch, first);
#pragma unroll
    for (int j = 0; j < kSplitColumns; j++) {
      const int unit = first + j;
      const float value = unit < units ? sum.data[j] + branch.b1.at_or(unit, 0.f) : 0.f;
      shared_hidden[s * stride + unit] = value;
      if (place.tile == 0 && unit < units) params.hidden[sample * params.units + branch.first_unit + unit] = value;
    }
  }
  __syncthreads();
  if (const int warp = threadIdx.x / kWarp; warp < place.samples) {
    float* const hidden = shared_hidden + warp * stride;
    activate_by_warp<kReluOrSilu>(params, branch, [&](int64_t j) { return hidden[j]; }, hidden);
  }
  __syncthreads();
  multiply_rows<kSamples>(all, weights, place, work, shared_hidden, stride, [&](int row, int64_t sample, float value) {
    params.put(place.branch, sample, row, value + branch.b2.at_or(row, 0.f));
  });
}

template <typename T, bool kReluOrSilu>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    transform_outputs(TransformParams<T> params, SliceParts parts, SplitWork work, int64_t most_units) {
  let_next_launch_start();
  find_outputs<kSplitSamples, kReluOrSilu>(params, parts, work, SplitPlace(work, params.samples, blockIdx.x),
                                           shared_memory<TransformOutputsShared>(most_units).hidden,
                                           [] { wait_for_previous_launch(); });
}

// ---- the launches ------------------------------------------------------------------------------------------------------------

// The hidden units in front of a w2, of both branches together, in whole vectors.
template <typename T>
int64_t hidden_units(const TransformParams<T>& params) {
  int64_t units = 0;
  for (const BranchParams<T>& branch : params.branch) units += branch.w2.data ? whole_vectors(branch.units) : 0;
  return units;
}

template <typename T>
bool transform_is_split(const TransformParams<T>& params) {
  return plan_cuda_transform_split(params.channels, hidden_units(params), sizeof(acc_t<T>), tuning());
}

// `params` are those of the attention pool that has left its splits to be merged here, or have no partial sums if the context
// is there. The transform has its samples.
template <typename T>
void launch_transform_split(const PoolParams<T>& params, Workspace& workspace, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    const TransformParams<T>& transform = params.transform;
    const BranchParams<T>&scale = transform.branch[kScale], &shift = transform.branch[kShift];
    const int64_t samples = transform.samples;
    if (samples == 0) return;
    SliceParts parts(transform.channels, scale.units, shift.units);
    parts.values = workspace.take<float>(samples * parts.slices * parts.width);
    const SplitWork first(samples, parts.slices, split_tiles(scale.units, kSplitRowTile),
                          split_tiles(shift.units, kSplitRowTile), /*in_turns=*/true);
    launch_early(transform_hidden_parts<T>, first.grid(samples), dim3(kSplitThreads),
                 shared_bytes<ContextSlice<kSplitSamples>>(), stream, params, parts, first);
    const int rows = split_tiles(transform.channels, kSplitRowTile);
    const SplitWork second(samples, /*slices=*/1, scale.units > 0 ? rows : 0, shift.units > 0 ? rows : 0, /*in_turns=*/true);
    const int64_t most_units = std::max(scale.w2.data ? scale.units : 0, shift.w2.data ? shift.units : 0);
    launch_early(transform.activation.is_relu_or_silu() ? transform_outputs<T, true> : transform_outputs<T, false>,
                 second.grid(samples), dim3(kSplitThreads), shared_bytes<TransformOutputsShared>(most_units), stream, transform,
                 parts, second, most_units);
  }
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_transform_split)

}  // namespace gcnet_ext::cuda
