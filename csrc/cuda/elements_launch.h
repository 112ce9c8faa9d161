// Host side of elements.cuh. Shared by the torch glue and the emulator.
#pragma once

#include <algorithm>

#include "elements.cuh"
#include "launch.h"

namespace gcnet_ext::cuda {

// A launch that goes through so many elements.
template <typename... Parameters, typename... Arguments>
void launch_elements(void (*kernel)(Parameters...), int64_t count, cudaStream_t stream, const Arguments&... arguments) {
  if (count == 0) return;
  const int64_t blocks = std::min((count + kElementThreads - 1) / kElementThreads, kCudaMaxBlocks);
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kElementThreads), 0, stream, arguments...);
}

template <typename T>
void launch_fuse_elements(const FuseParams<T>& params, const Map<const T>& residual, bool relu, const Valid<T>& valid,
                          cudaStream_t stream) {
  const Extent& extent = params.extent;
  launch_elements(fuse_elements<T>, extent.samples * extent.channels * extent.positions, stream, params, residual, relu, valid);
}

template <typename T>
void launch_positive_bits(const Map<const T>& out, const Extent& extent, uint8_t* bits, cudaStream_t stream) {
  const RowsOf rows(extent);
  launch_elements(positive_bits<T>, extent.samples * rows.rows * rows.bytes(), stream, out, extent, bits);
}

template <typename T>
void launch_relu_backward(const Map<const T>& grad, const Map<T>& result, const Extent& extent, const uint8_t* bits,
                          cudaStream_t stream) {
  launch_elements(relu_backward<T>, extent.samples * extent.channels * extent.positions, stream, grad, result, extent, bits);
}

// `valid` with its shares, if it is there.
template <typename T>
Valid<T> with_shares(Valid<T> valid, const Extent& extent, Workspace& workspace, cudaStream_t stream) {
  if (!valid.data) return valid;
  acc_t<T>* const shares = workspace.take<acc_t<T>>(extent.samples);
  launch_elements(valid_shares<T>, extent.samples * kWarp, stream, valid, extent, shares);
  valid.shares = shares;
  return valid;
}

template <typename T>
void launch_average_valid(const Map<const T>& x, const Extent& extent, const Valid<T>& valid, acc_t<T>* context,
                          cudaStream_t stream) {
  launch_elements(average_valid<T>, extent.samples * extent.channels * kWarp, stream, x, extent, valid, context);
}

}  // namespace gcnet_ext::cuda
