// The end of an attention pool by items that no transform follows: a launch in which many blocks merge the splits of the samples
// and turn the logits into the attention.
#pragma once

#include "context_slice.cuh"

namespace gcnet_ext::cuda {

template <typename T>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    attention_pool_merge(PoolParams<T> params, int slice_channels, SplitWork work) {
  auto& shared = shared_memory<ContextSlice<kSplitSamples>>();
  const SplitPlace place(work, params.extent.samples, blockIdx.x);
  const int first_channel = place.slice * slice_channels, left = static_cast<int>(params.extent.channels) - first_channel;
  wait_for_previous_launch();
  find_factors(params, place, shared);
  __syncthreads();
  merge_slice(params, place, first_channel, left < slice_channels ? left : slice_channels, /*stores=*/true, shared);
  if (params.attention) write_attention(params, place, work.slices, shared);
}

template <typename T>
void launch_attention_pool_merge(const PoolParams<T>& params, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    const int64_t samples = params.extent.samples;
    if (samples == 0) return;
    const CudaTransformSlices cut = plan_cuda_transform_slices(params.extent.channels);
    const SplitWork work(samples, static_cast<int>(cut.slices), /*tiles_of_scale=*/1, /*tiles_of_shift=*/0, /*in_turns=*/false);
    launch_early(attention_pool_merge<T>, work.grid(samples), dim3(kSplitThreads), shared_bytes<ContextSlice<kSplitSamples>>(),
                 stream, params, static_cast<int>(cut.channels), work);
  }
}

}  // namespace gcnet_ext::cuda
