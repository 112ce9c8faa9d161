// The backward pass of the ReLU that ends a block. It reads no map but the gradient: the forward pass keeps a bit for each
// element.
#pragma once

#include "elements.cuh"

namespace gcnet_ext::cuda {

// A bit is 0 where out is at most 0. A thread writes a byte at a time.
template <typename T>
__global__ void __launch_bounds__(kElementThreads) positive_bits(Map<const T> out, Extent extent, uint8_t* bits) {
  const RowsOfSample rows(extent);
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

template <typename T>
void launch_positive_bits(const Map<const T>& out, const Extent& extent, uint8_t* bits, cudaStream_t stream) {
  const RowsOfSample rows(extent);
  launch_elements(positive_bits<T>, extent.samples * rows.rows * rows.bytes(), stream, out, extent, bits);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_positive_bits)

// result = grad where the bit is 1, otherwise 0.
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    relu_backward(Map<const T> grad, Map<T> result, Extent extent, const uint8_t* bits) {
  const RowsOfSample rows(extent);
  for_elements(extent.samples * extent.channels * extent.positions, [&](int64_t i) {
    const Place at(rows, i);
    const bool passes = load(bits + at.bit / 8) >> at.bit % 8 & 1;
    store(at.in(result), passes ? load(at.in(grad)) : static_cast<T>(0.0f));
  });
}

template <typename T>
void launch_relu_backward(const Map<const T>& grad, const Map<T>& result, const Extent& extent, const uint8_t* bits,
                          cudaStream_t stream) {
  launch_elements(relu_backward<T>, extent.elements(), stream, grad, result, extent, bits);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_relu_backward)

}  // namespace gcnet_ext::cuda
