// The groups of warps of an attention pool in channels_last: the warps of a group share the channels of a position, and the
// groups of a block work on different positions. A lane keeps a few positions of its channels in registers, so that x is read
// once although it is needed twice, for a sum over the channels and for a sum over the positions.
#pragma once

#include "attention_pool_split.cuh"

namespace gcnet_ext::cuda {

// The warps of a block.
struct PositionWarps {
  int all, of_group, groups;

  PositionWarps(const Extent& extent, const CudaPoolPlan& plan)
      : all(plan.threads / kWarp),
        of_group(static_cast<int>((extent.channels + kWarp * plan.vector - 1) / (kWarp * plan.vector))),
        groups(all / of_group) {}
};

template <typename A>
struct PoolPositionsShared {
  A* sums;       // [2, warps, positions]: over the channels of a warp, for two tiles in turn
  A* softmaxes;  // [groups, 2]: maximum and sum
  A* totals;     // [groups, channels]

  __host__ __device__ PoolPositionsShared(auto& memory, int warps, int groups, int64_t channels) {
    memory.take(sums, 2 * warps * kCudaPositionsPerWarp);
    memory.take(softmaxes, 2 * groups);
    memory.take(totals, groups * channels);
  }
};

// A lane's part of the pool of its group. Warp w of a group of `warps` has the channels (32*w + lane)*V, (32*w + lane)*V + 1, ...
template <typename T, int V>
class PositionGroup {
  using A = acc_t<T>;
  static constexpr int kLowest =
      kWarp / kCudaPositionsPerWarp;  // lanes that differ in lower bits have the logit of one position

 public:
  static constexpr int positions = kCudaPositionsPerWarp;
  Vector<T, V> values[positions];  // of a tile

  __device__ PositionGroup(int64_t channels, int warps)
      : channels_(channels),
        lane_(threadIdx.x % kWarp),
        warp_(threadIdx.x / kWarp),
        all_warps_(blockDim.x / kWarp),
        warps_(warps),
        channel_(static_cast<int64_t>(warp_ % warps * kWarp + lane_) * V) {}

  __device__ void fetch_weight(const Parameter<T>& weight) {
    if (has_channels()) weight.get(channel_, weight_);
  }

  __device__ int first() const { return warp_ / warps_ * positions; }  // the group's first position within a tile
  __device__ int64_t channel() const { return channel_; }
  __device__ bool has_channels() const { return channel_ < channels_; }
  __device__ int count() const { return all_warps_ / warps_; }
  // Whether this lane stores the logits of the position that it has.
  __device__ bool stores_logit() const { return warp_ % warps_ == 0 && share_.owner; }
  __device__ int logit_position() const { return share_.first; }  // within the group's positions

  // Returns the sum of weight_c x_cp over all channels c for one position p, logit_position().
  __device__ A sum_over_channels(const PoolPositionsShared<A>& shared) {
    A sum[positions];
#pragma unroll
    for (int i = 0; i < positions; i++) {
      sum[i] = A(0);
#pragma unroll
      for (int j = 0; j < V; j++) sum[i] += weight_[j] * widen(values[i].data[j]);
    }
    share_ = transposed_sum<positions, 1, kWarp / 2>(sum, lane_);
    if (warps_ == 1) return sum[0];
    A* of_tile = shared.sums + turn_ * all_warps_ * positions;
    turn_ ^= 1;
    if (share_.owner) of_tile[warp_ * positions + share_.first] = sum[0];
    __syncthreads();
    A logit = A(0);
    for (int w = 0; w < warps_; w++) logit += of_tile[(warp_ / warps_ * warps_ + w) * positions + share_.first];
    return logit;
  }

  // Adds the tile to the running softmax and to the weighted sums over the positions. The logit is -inf where a position does
  // not count.
  __device__ void add(A logit) {
    const A rescale = softmax_.raise_maximum(max_over_lanes(logit, kLowest, kWarp / 2));
    const A exponent = exponential(logit - softmax_.reference());
    softmax_.sum += sum_over_lanes(exponent, kLowest, kWarp / 2);
    hide();
#pragma unroll
    for (int j = 0; j < V; j++) weighted_[j] *= rescale;
#pragma unroll
    for (int i = 0; i < positions; i++) {
      const A of_position = __shfl_sync(kAllLanes, exponent, i * kLowest);
#pragma unroll
      for (int j = 0; j < V; j++) weighted_[j] += of_position * widen(values[i].data[j]);
    }
  }

  // Keeps the compiler from widening the tile before this point and holding on to the result.
  __device__ void hide() {
#pragma unroll
    for (int i = 0; i < positions; i++) hide_from_optimizer(values[i]);
  }

  // Leaves the weighted sums, the maximum and the sum of the block's tiles, merged from those of its groups, in `partial`.
  __device__ void merge(const PoolPositionsShared<A>& shared, A* partial) const {
    const int groups = count(), group = warp_ / warps_;
    if (has_channels()) {
#pragma unroll
      for (int j = 0; j < V; j++) shared.totals[group * channels_ + channel_ + j] = weighted_[j];
    }
    if (warp_ % warps_ == 0 && lane_ == 0) {
      shared.softmaxes[2 * group] = softmax_.maximum;
      shared.softmaxes[2 * group + 1] = softmax_.sum;
    }
    __syncthreads();
    OnlineSoftmax<A> of_block;
    for (int g = 0; g < groups; g++) of_block.maximum = larger(of_block.maximum, shared.softmaxes[2 * g]);
    for (int g = 0; g < groups; g++)
      of_block.sum += shared.softmaxes[2 * g + 1] * exponential(shared.softmaxes[2 * g] - of_block.reference());
    for (int64_t c = threadIdx.x; c < channels_; c += blockDim.x) {
      A total = A(0);
      for (int g = 0; g < groups; g++)
        total += shared.totals[g * channels_ + c] * exponential(shared.softmaxes[2 * g] - of_block.reference());
      partial[c] = total;
    }
    if (threadIdx.x == 0) {
      partial[channels_] = of_block.maximum;
      partial[channels_ + 1] = of_block.sum;
    }
  }

  // Begins anew, after a merge.
  __device__ void reset() {
    softmax_ = {};
#pragma unroll
    for (int j = 0; j < V; j++) weighted_[j] = A(0);
  }

 private:
  int64_t channels_;
  int lane_, warp_, all_warps_, warps_;
  int64_t channel_;
  int turn_ = 0;
  Share share_{};
  A weight_[V] = {}, weighted_[V] = {};
  OnlineSoftmax<A> softmax_;
};

}  // namespace gcnet_ext::cuda
