// Sweeps over a map: out = relu(x*scale + shift + residual), what its gradients need, and the sums over positions.
#pragma once

#include "sweep.h"
#include "valid.h"

namespace gcnet_ext::cpu {

// The bits of a final ReLU: [N, bytes_of_bits]. Without data there are none.
template <typename byte_t>
struct BitMap {
  byte_t* data = nullptr;
  int64_t sample_bytes = 0, row_bytes = 0;

  BitMap samples(int64_t first) const { return {data + first * sample_bytes, sample_bytes, row_bytes}; }
  // The bits of a block of a map that lies as `layout` says.
  Bits<byte_t> block(const Layout& layout, const SweepItem& item) const {
    if (!data) return {};
    const int64_t row = layout.channels_last ? item.p0 : item.c0, column = layout.channels_last ? item.c0 : item.p0;
    return {data + item.sample * sample_bytes + row * row_bytes + column / 8, row_bytes};
  }
};

template <typename byte_t>
BitMap<byte_t> bits_of(const Tensor& positive, const Layout& layout) {
  if (positive.numel() == 0) return {};
  const int64_t length = layout.channels_last ? layout.channels : layout.positions;
  return {static_cast<byte_t*>(positive.data_ptr()), positive.size(1), (length + 7) / 8};
}

// What is added to x and what it is multiplied with. A matrix [N, C] or the residual may be absent.
template <typename scalar_t>
struct MapFusion {
  Matrix<const acc_t<scalar_t>> scale{}, shift{};
  Map<const scalar_t> residual{};
  bool relu = false;
  BitMap<uint8_t> positive{};  // is written, if it has data

  MapFusion samples(int64_t first, int64_t count) const {
    return {scale.row_range(first, count), shift.row_range(first, count), residual.samples(first, count), relu,
            positive.samples(first)};
  }
};

// out = relu(x*scale + shift + residual)
template <typename scalar_t>
void fuse_samples(const Map<const scalar_t>& x, const MapFusion<scalar_t>& fusion, const Map<scalar_t>& out) {
  const auto fuse = map_kernels<scalar_t>().channel_fuse;
  const auto fuse_block = [&](const SweepItem& item) {
    const BlockFusion<scalar_t> of_block{.scale = channels_of(fusion.scale, item),
                                         .shift = channels_of(fusion.shift, item),
                                         .residual = block_of(fusion.residual, item),
                                         .relu = fusion.relu,
                                         .positive = fusion.positive.block(x.layout, item)};
    fuse(block_of(x, item), of_block, block_of(out, item));
  };
  for_each_block(sweep_plan(x), x.layout, fuse_block, Order::backwards);
}

// The gradient before the final ReLU: masked = grad where the bit is 1, and 0 elsewhere. Without data there is no ReLU.
template <typename scalar_t>
struct ReluBackward {
  Map<const scalar_t> grad{};
  BitMap<const uint8_t> positive{};
  Map<scalar_t> masked{};

  ReluBackward() = default;
  // grad is native, and `masked` lies as it does.
  ReluBackward(const Tensor& grad, const Tensor& positive, const Tensor& masked)
      : grad(read_map<scalar_t>(grad)),
        positive(bits_of<const uint8_t>(positive, this->grad.layout)),
        masked(write_map<scalar_t>(masked, masked)) {}

  explicit operator bool() const { return masked.data != nullptr; }
  ReluBackward samples(int64_t first, int64_t count) const {
    ReluBackward part;
    part.grad = grad.samples(first, count), part.positive = positive.samples(first), part.masked = masked.samples(first, count);
    return part;
  }
  void block(const SweepItem& item) const {
    map_kernels<scalar_t>().relu_backward(block_of(grad, item), positive.block(grad.layout, item), block_of(masked, item));
  }
};

template <typename scalar_t>
void relu_backward_samples(const ReluBackward<scalar_t>& relu) {
  for_each_block(sweep_plan(relu.grad), relu.grad.layout, [&](const SweepItem& item) { relu.block(item); });
}

// The tensor for the gradient before the final ReLU, which is the gradient of the residual. If that is not needed, it is the
// memory of grad_x, whose elements are written one by one as they are read.
inline Tensor masked_gradient(const Tensor& x, const Tensor& grad_residual, const Tensor& grad_x) {
  return grad_residual.numel() > 0 ? grad_residual : grad_x.numel() > 0 ? grad_x : empty_like_map(x);
}

// sum_a[n, c] = sum_p a_ncp and sum_ab[n, c] = sum_p a_ncp b_ncp over the positions that count; either sum may be absent. If a
// is the gradient before a ReLU, each block of it is computed before it is summed.
template <typename scalar_t>
void sum_samples(const Map<const scalar_t>& a, const Map<const scalar_t>& b, const Valid& valid, Matrix<acc_t<scalar_t>> sum_a,
                 Matrix<acc_t<scalar_t>> sum_ab, const ReluBackward<scalar_t>& relu = {}) {
  using acc = acc_t<scalar_t>;
  const int64_t samples = a.layout.samples, channels = a.layout.channels;
  const SweepPlan plan = sweep_plan(a);
  const auto sums = map_kernels<scalar_t>().channel_sums;
  const int64_t blocks = plan.position_blocks;
  // One partial sum per block of positions, then added in their order.
  const MatrixBuffer<acc> parts_a(samples * blocks, channels, sum_a.data), parts_ab(samples * blocks, channels, sum_ab.data);
  for_each_block(plan, a.layout, [&](const SweepItem& item) {
    const auto zeros_in = [&](const Matrix<acc>& parts) -> acc* {
      if (!parts.data) return nullptr;
      acc* const part = parts.row(item.sample * blocks + item.position_block) + item.c0;
      std::fill_n(part, item.channels, acc(0));
      return part;
    };
    acc *const part_a = zeros_in(parts_a), *const part_ab = zeros_in(parts_ab);
    if (relu) relu.block(item);
    valid.for_each_run(item.sample, item.p0, item.p0 + item.positions, [&](int64_t begin, int64_t end) {
      sums(block_of(a, item, begin, end), block_of(b, item, begin, end), part_a, part_ab);
    });
  });
  parallel_for(samples, samples * blocks * channels, [&](int64_t n) {
    const auto merge = [&](const Matrix<acc>& total, const Matrix<acc>& parts) {
      if (!total.data) return;
      std::fill_n(total.row(n), channels, acc(0));
      for (int64_t block = 0; block < blocks; block++) {
        for (int64_t c = 0; c < channels; c++) total.row(n)[c] += parts.row(n * blocks + block)[c];
      }
    };
    merge(sum_a, parts_a);
    merge(sum_ab, parts_ab);
  });
}

}  // namespace gcnet_ext::cpu
