// Host side of transform_batched.cuh and parameter_gradients.cuh. Shared by the torch glue and the emulator.
#pragma once

#include <algorithm>

#include "launch.h"
#include "parameter_gradients.cuh"
#include "transform_batched.cuh"

namespace gcnet_ext::cuda {

// Zeroed counters that the batched transform needs in its backward pass.
inline int64_t batch_counters(int64_t samples) { return batch_tiles(samples, kBatchSamples); }

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
    launch(params.activation.usual() ? transform_layer<T, true> : transform_layer<T, false>,
           dim3(static_cast<unsigned>((tiles[kScale] + tiles[kShift]) * sample_tiles)), dim3(kBatchThreads),
           layer_shared_bytes<T>(), stream, params, layer, turns, tiles[kScale], tiles[kShift]);
  }
}

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
    launch(forward.activation.usual() ? transform_backward_layer<T, true> : transform_backward_layer<T, false>,
           dim3(static_cast<unsigned>(blocks)), dim3(kBatchThreads), backward_layer_shared_bytes<T>(), stream, params, layer,
           tiles[kScale], tiles[kShift]);
  }
}

template <typename T>
void launch_parameter_gradients(const GradientParams<T>& params, cudaStream_t stream) {
  if (params.count == 0) return;
  launch(parameter_gradients<T>, dim3(static_cast<unsigned>(params.blocks())), dim3(kGradientThreads),
         gradient_shared_bytes<T>(), stream, params);
}

}  // namespace gcnet_ext::cuda
