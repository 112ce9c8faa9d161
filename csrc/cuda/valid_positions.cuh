// The positions that count in the attention pool, if not all of them do.
#pragma once

#include "elements.cuh"
#include "reduce.cuh"

namespace gcnet_ext::cuda {

// Which positions of each sample count; without data, all of them do.
template <typename T>
struct Valid {
  const uint8_t* data = nullptr;
  int64_t sample_stride = 0;         // P, or 0 where all samples have the same
  const acc_t<T>* shares = nullptr;  // [N]: 1 / the number of positions that count, or 0 if none does

  __device__ const uint8_t* row(int64_t sample) const { return data + sample * sample_stride; }
  __device__ bool at(int64_t sample, int64_t position) const { return load(row(sample) + position) != 0; }
  __device__ bool counts(int64_t sample, int64_t position) const { return !data || at(sample, position); }
};

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

// Returns `valid` with its shares, unless it is absent.
template <typename T>
Valid<T> with_shares(Valid<T> valid, const Extent& extent, Workspace& workspace, cudaStream_t stream) {
  if (!valid.data) return valid;
  acc_t<T>* const shares = workspace.take<acc_t<T>>(extent.samples);
  launch_elements(valid_shares<T>, extent.samples * kWarp, stream, valid, extent, shares);
  valid.shares = shares;
  return valid;
}
GCNET_EXT_COMPILED_ELSEWHERE(with_shares)

// context [N, C] = the averages over the positions that count. The others are not read: they may hold a NaN.
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

template <typename T>
void launch_average_valid(const Map<const T>& x, const Extent& extent, const Valid<T>& valid, acc_t<T>* context,
                          cudaStream_t stream) {
  launch_elements(average_valid<T>, extent.samples * extent.channels * kWarp, stream, x, extent, valid, context);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_average_valid)

}  // namespace gcnet_ext::cuda
