// The fusion with everything that it can have, out = act(x * scale + shift + residual), the bits of its ReLU, and the gradient
// through it; and average pooling over some of the positions. Plain loops over all elements: the fast ways are those of
// channel_fuse.cuh and channel_sums.cuh, for what most blocks have.
//
// Elements are numbered as they lie in a dense map. A row is a channel of P positions, or in channels_last a position of C
// channels.
#pragma once

#include "channel_fuse.cuh"

namespace gcnet_ext::cuda {

constexpr int kElementThreads = 256;

// Calls body(i) for every i < count, by all threads of a launch.
template <typename Body>
__device__ __forceinline__ void for_elements(int64_t count, const Body& body) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) body(i);
}

// The rows of a sample and what they have.
struct RowsOf {
  bool channels_last;
  int64_t rows, length;

  __host__ __device__ explicit RowsOf(const Extent& extent)
      : channels_last(extent.channels_last),
        rows(channels_last ? extent.positions : extent.channels),
        length(channels_last ? extent.channels : extent.positions) {}

  // A row's bits begin with a byte of their own.
  __host__ __device__ int64_t bytes() const { return (length + 7) / 8; }
};

struct Place {
  int64_t sample, channel, position, bit;  // the number of its bit among those of all samples

  __device__ Place(const RowsOf& of, int64_t element) {
    const int64_t row = element / of.length, column = element % of.length;
    sample = row / of.rows;
    channel = of.channels_last ? column : row % of.rows;
    position = of.channels_last ? row % of.rows : column;
    bit = row * of.bytes() * 8 + column;
  }
  template <typename T>
  __device__ T* in(const Map<T>& map) const {
    return map.at(sample, channel, position);
  }
};

// With `valid`, shift is what a sample's average gets, and its valid positions have a share in it; the others have none.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    fuse_elements(FuseParams<T> params, Map<const T> residual, bool relu, Valid<T> valid) {
  using A = acc_t<T>;
  const Extent& extent = params.extent;
  const RowsOf rows(extent);
  for_elements(extent.samples * extent.channels * extent.positions, [&](int64_t i) {
    const Place at(rows, i);
    auto factors = params.factors(at.sample * extent.channels + at.channel);
    if (valid.data) factors.shift = valid.at(at.sample, at.position) ? factors.shift * valid.shares[at.sample] : -A(0);
    A value = multiply_add(params.x.data ? widen(load(at.in(params.x))) : A(0), factors.scale, factors.shift);
    if (residual.data) value += widen(load(at.in(residual)));
    if (relu && value < A(0)) value = A(0);  // a NaN stays one
    store(at.in(params.out), static_cast<T>(value));
  });
}

// One byte of bits at a time: 0 where out is at most 0.
template <typename T>
__global__ void __launch_bounds__(kElementThreads) positive_bits(Map<const T> out, Extent extent, uint8_t* bits) {
  const RowsOf rows(extent);
  for_elements(extent.samples * rows.rows * rows.bytes(), [&](int64_t i) {
    const int64_t first = i % rows.bytes() * 8, left = rows.length - first, row = i / rows.bytes();
    unsigned byte = 0;
    for (int64_t j = 0; j < 8 && j < left; j++) {
      const bool zero = widen(load(Place(rows, row * rows.length + first + j).in(out))) <= acc_t<T>(0);
      byte |= (zero ? 0u : 1u) << j;
    }
    store(bits + i, static_cast<uint8_t>(byte));
  });
}

// result = grad where the bit says so, otherwise 0.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    relu_backward(Map<const T> grad, Map<T> result, Extent extent, const uint8_t* bits) {
  const RowsOf rows(extent);
  for_elements(extent.samples * extent.channels * extent.positions, [&](int64_t i) {
    const Place at(rows, i);
    const bool passes = load(bits + at.bit / 8) >> at.bit % 8 & 1;
    store(at.in(result), passes ? load(at.in(grad)) : static_cast<T>(0.0f));
  });
}

// A warp has an item at a time: calls body(i, lane) for every i < count.
template <typename Body>
__device__ __forceinline__ void for_warps(int64_t count, const Body& body) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  for (int64_t i = first; i < count; i += warps) body(i, threadIdx.x % kWarp);
}

// The shares of `valid`.
template <typename T>
__global__ void __launch_bounds__(kElementThreads) valid_shares(Valid<T> valid, Extent extent, acc_t<T>* shares) {
  using A = acc_t<T>;
  for_warps(extent.samples, [&](int64_t n, int lane) {
    int64_t count = 0;
    for (int64_t p = lane; p < extent.positions; p += kWarp) count += valid.at(n, p);
    count = warp_sum(count);
    if (lane == 0) shares[n] = count ? A(1) / static_cast<A>(count) : A(0);
  });
}

// context [N, C] = the averages over the valid positions; what the others hold is not looked at.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    average_valid(Map<const T> x, Extent extent, Valid<T> valid, acc_t<T>* context) {
  using A = acc_t<T>;
  for_warps(extent.samples * extent.channels, [&](int64_t row, int lane) {
    const int64_t n = row / extent.channels, c = row % extent.channels;
    A sum = A(0);
    for (int64_t p = lane; p < extent.positions; p += kWarp) {
      if (valid.at(n, p)) sum += widen(load(x.at(n, c, p)));
    }
    sum = warp_sum(sum);
    if (lane == 0) context[row] = sum * valid.shares[n];
  });
}

}  // namespace gcnet_ext::cuda
