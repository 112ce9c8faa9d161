// Sweeps over samples of a feature map that other ops use too.
#pragma once

#include "tensors.h"
#include "valid.h"

namespace gcnet_ext::cpu {

// The bits of a final ReLU for all samples of a map: [N, bytes_of_bits].
template <typename byte_t>
struct BitMap {
  byte_t* data = nullptr;
  int64_t sample_bytes = 0, row_bytes = 0;

  // Those of a block that begins at channel c0 and position p0.
  Bits<byte_t> block(const Layout& layout, int64_t sample, int64_t c0, int64_t p0) const {
    if (!data) return {};
    const int64_t row = layout.channels_last ? p0 : c0, column = layout.channels_last ? c0 : p0;
    return {data + sample * sample_bytes + row * row_bytes + column / 8, row_bytes};
  }
};

// Without data where the tensor has no bits.
template <typename byte_t>
BitMap<byte_t> bits_of(const Tensor& positive, const Layout& layout) {
  if (positive.numel() == 0) return {};
  const int64_t length = layout.channels_last ? layout.channels : layout.positions;
  return {static_cast<byte_t*>(positive.data_ptr()), positive.size(1), (length + 7) / 8};
}

// What becomes of x in the fusion, for all samples.
template <typename scalar_t>
struct Fusions {
  const acc_t<scalar_t>*scale = nullptr, *shift = nullptr;  // [N, C]; either may be null
  Map<const scalar_t> residual{};                           // without data there is none
  bool relu = false;
  BitMap<uint8_t> positive{};  // is written, if it has data
};

// out = relu(x*scale + shift + residual) for samples first <= n < first + count.
template <typename scalar_t>
void fuse_samples(const Map<const scalar_t>& x, const Fusions<scalar_t>& fusions, int64_t first, int64_t count,
                  const Map<scalar_t>& out);

// dx = g*scale + shift for those samples, with the shift only at positions that count.
template <typename scalar_t>
void average_backward_samples(const Map<const scalar_t>& grad, const acc_t<scalar_t>* scale, const acc_t<scalar_t>* shift,
                              const Valid& valid, int64_t first, int64_t count, const Map<scalar_t>& grad_x);

// The gradient before the final ReLU: masked = grad where the bit is 1, and 0 elsewhere. Without bits there is no ReLU.
template <typename scalar_t>
struct ThroughRelu {
  Map<const scalar_t> grad;
  BitMap<const uint8_t> positive;
  Map<scalar_t> masked;
};

// grad is native, and `masked` lies as it does; without a ReLU nothing is computed.
template <typename scalar_t>
ThroughRelu<scalar_t> through_relu(bool relu, const Tensor& grad, const Tensor& positive, const Tensor& masked) {
  if (!relu) return {};
  const auto map = read_map<scalar_t>(grad);
  return {map, bits_of<const uint8_t>(positive, map.layout), write_map<scalar_t>(masked, masked)};
}

template <typename scalar_t>
void relu_backward_samples(const ThroughRelu<scalar_t>& relu, int64_t first, int64_t count);

// sum_a[n, c] = sum_p a_ncp and sum_ab[n, c] = sum_p a_ncp b_ncp for those samples and the positions that count; either sum may
// be null. If a is the gradient before a ReLU, each block of it is computed before it is summed.
template <typename scalar_t>
void sum_samples(const Map<const scalar_t>& a, const Map<const scalar_t>& b, const Valid& valid, int64_t first, int64_t count,
                 acc_t<scalar_t>* sum_a, acc_t<scalar_t>* sum_ab, const ThroughRelu<scalar_t>& relu = {});

// Where the gradient of the result goes when it went through the final ReLU: it is that of the residual. If that is not needed it
// lies where grad_x will, which is written element by element as it is read.
Tensor masked_gradient(const Tensor& x, const Tensor& grad_residual, const Tensor& grad_x);

}  // namespace gcnet_ext::cpu
