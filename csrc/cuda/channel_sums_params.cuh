// The parameters of the sums over the positions of a feature map (channel_sums.cuh), and what they do with a sum.
#pragma once

#include "feature_map.cuh"
#include "launch.h"
#include "shared_memory.cuh"
#include "transform_backward.cuh"
#include "valid_positions.cuh"

namespace gcnet_ext::cuda {

enum class AfterSums { nothing, transform, transform_backward };

template <typename T>
struct SumsParams {
  using A = acc_t<T>;
  Map<const T> a, b;   // b is absent where there is no sum_ab
  Map<T> fused;        // absent where nobody needs it
  Parameter<T> scale;  // [N, C], of fused; absent: fused is a, bit for bit
  Extent extent;
  MutableParameter<T> sum_a, sum_ab;  // [N, C]; either may be absent
  A factor = 1;                       // a factor of sum_a
  A* partial = nullptr;               // [N, splits, 2, C], where a sample has splits
  unsigned* arrived = nullptr;  // [N], zero before the launch: the blocks that are done; null if no block finishes a sample
  int64_t first_sample = 0;     // of this launch
  unsigned blocks_per_sample = 0;
  AfterSums after = AfterSums::nothing;
  bool next_is_early = false;  // whether launch_early() starts the next launch
  // The bits of a final ReLU, by which a is masked: where the bit is 0, a counts as 0. Read by sums_items alone, as is valid.
  const uint8_t* positive = nullptr;
  Valid<T> valid;  // positions that do not count are left out; then a factor of sum_a is the share of the others
  // Whether sum_ab is the gradient of the gate, which put() turns into the gradient of t_scale. For a hard sigmoid, put() then
  // also computes the scale again, because the forward pass keeps the gate alone.
  bool through_gate = false;
  TransformParams<T> transform;
  TransformGradParams<T> transform_grad;

  __device__ void put(int64_t sample, int64_t channel, A total_a, A total_ab) const {
    const int64_t i = sample * extent.channels + channel;
    if (sum_a.wanted()) sum_a.put(i, total_a * factor);
    if (!sum_ab.wanted()) return;
    if (through_gate) {
      const TransformParams<T>& forward = transform_grad.forward;
      total_ab = gate_backward(forward, forward.gate[i], total_ab);
      if (forward.hard_sigmoid) forward.scale[i] = clip(forward.gate[i], A(0), A(1));
    }
    sum_ab.put(i, total_ab);
  }
};

}  // namespace gcnet_ext::cuda
