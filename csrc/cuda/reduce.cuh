// Sums and maxima over the lanes of a warp, loops that keep several loads under way, and the test for the last block of a sample.
#pragma once

#include "memory_access.h"
#include "numbers.cuh"

namespace gcnet_ext::cuda {

// Calls use(i, load(i)) for i = first, first + step, ... below end, in this order and with kTogether loads under way at a time.
// A block that works alone cannot hide the latency of a loop that uses each value before it loads the next.
template <int kTogether, typename Load, typename Use>
__device__ __forceinline__ void load_ahead(int64_t first, int64_t end, int64_t step, const Load& load, const Use& use) {
  for (int64_t i = first; i < end; i += kTogether * step) {
    decltype(load(i)) values[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; u++) {
      values[u] = {};
      if (i + u * step < end) values[u] = load(i + u * step);
    }
#pragma unroll
    for (int u = 0; u < kTogether; u++) {
      if (i + u * step < end) use(i + u * step, values[u]);
    }
  }
}

// The sum over the lanes whose numbers differ in the bits first, 2*first, ... last alone. Every lane gets the result.
template <typename A>
__device__ __forceinline__ A sum_over_lanes(A value, int first, int last) {
  for (int bit = first; bit <= last; bit *= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

template <typename A>
__device__ __forceinline__ A max_over_lanes(A value, int first, int last) {
  for (int bit = first; bit <= last; bit *= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, bit));
  return value;
}

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
  return sum_over_lanes(value, 1, kWarp / 2);
}

template <typename A>
__device__ __forceinline__ A warp_max(A value) {
  return max_over_lanes(value, 1, kWarp / 2);
}

// Returns a if all bits of mask are set, and b if none is. It works on the bits, because the compiler turns a conditional
// expression on the lane into a branch around the shuffles that follow.
__device__ __forceinline__ float blend(uint32_t mask, float a, float b) {
  const uint32_t bits = (__builtin_bit_cast(uint32_t, a) & mask) | (__builtin_bit_cast(uint32_t, b) & ~mask);
  return __builtin_bit_cast(float, bits);
}
__device__ __forceinline__ double blend(uint32_t mask, double a, double b) {
  const uint64_t wide = mask * 0x100000001ull;
  return __builtin_bit_cast(double, (__builtin_bit_cast(uint64_t, a) & wide) | (__builtin_bit_cast(uint64_t, b) & ~wide));
}

// The totals of transposed_sum that a lane has at its end.
struct Share {
  int first;   // values[0], values[1], ... of this lane are the totals number first, first + 1, ...
  bool owner;  // true in one of the lanes that have these totals
};

// kCount sums over the lanes that differ in the bits kFirst ... kLast, for far fewer shuffles than one by one: each step hands
// half of the values to the partner lane and takes over the partner's part of the other half. Afterwards a lane holds
// max(1, kCount / lanes) totals.
template <int kCount, int kFirst, int kLast, typename A, size_t kSize>
__device__ __forceinline__ Share transposed_sum(A (&values)[kSize], int lane) {
  if constexpr (kLast < kFirst) {
    return {0, true};
  } else if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    uint32_t upper = (lane & kLast) ? ~0u : 0u;
    hide_from_optimizer(upper);
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const A sent = blend(upper, values[i], values[i + kHalf]), kept = blend(upper, values[i + kHalf], values[i]);
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, kLast);
    }
    const Share rest = transposed_sum<kHalf, kFirst, kLast / 2>(values, lane);
    return {rest.first + static_cast<int>(upper & kHalf), rest.owner};
  } else {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], kLast);
    const Share rest = transposed_sum<1, kFirst, kLast / 2>(values, lane);
    return {rest.first, rest.owner && (lane & kLast) == 0};
  }
}

// Whether this block is the last of `blocks` to get here. The last one sees everything that the others wrote before they got
// here.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned blocks, unsigned* shared_word) {
  __syncthreads();
  if (threadIdx.x == 0) *shared_word = fetch_add_acq_rel(counter, 1);
  __syncthreads();
  return *shared_word == blocks - 1;
}

}  // namespace gcnet_ext::cuda
