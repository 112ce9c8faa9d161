// The pool without a weight: the mean over the positions that count.
#pragma once

#include "channel_fuse.h"

namespace gcnet_ext::cpu {

// Divides by the number of positions that count: a sum becomes a mean, and a mean's gradient becomes each position's gradient.
template <typename acc>
void divide_by_count(const Valid& valid, Matrix<acc> values) {
  for (int64_t n = 0; n < values.rows; n++) {
    const int64_t count = std::max<int64_t>(1, valid.count(n));  // the sum over no position is 0
    for (int64_t c = 0; c < values.columns; c++) values.row(n)[c] /= acc(count);
  }
}

template <typename scalar_t>
void average_samples(const Map<const scalar_t>& x, const Valid& valid, Matrix<acc_t<scalar_t>> context) {
  sum_samples<scalar_t>(x, {}, valid, context, {});
  divide_by_count(valid, context);
}

// dx = g*scale + dctx / count at the positions that count, of which there are `count`, and g*scale elsewhere.
template <typename scalar_t>
void average_backward_samples(const Map<const scalar_t>& grad, Matrix<const acc_t<scalar_t>> scale,
                              Matrix<acc_t<scalar_t>> grad_context, const Valid& valid, const Map<scalar_t>& grad_x) {
  divide_by_count(valid, grad_context);
  const auto fuse = map_kernels<scalar_t>().channel_fuse;
  const auto fuse_block = [&](const SweepItem& item) {
    const auto *s = channels_of(scale, item), *dctx = channels_of(grad_context, item);
    valid.for_each_piece(item.sample, item.p0, item.p0 + item.positions, [&](int64_t begin, int64_t end, bool counts) {
      fuse(block_of(grad, item, begin, end), {s, counts ? dctx : nullptr}, block_of(grad_x, item, begin, end));
    });
  };
  for_each_block(sweep_plan(grad), grad.layout, fuse_block, Order::backwards);
}

// dx = dctx over the number of positions that count, at those positions, and 0 elsewhere.
template <typename scalar_t>
void average_pool_backward(Matrix<const acc_t<scalar_t>> grad_context, const Valid& valid, const Map<scalar_t>& grad_x) {
  const Layout& layout = grad_x.layout;
  parallel_for(layout.samples, layout.samples * layout.channels * layout.positions, [&](int64_t n) {
    std::vector<scalar_t> counted(layout.channels), zeros(layout.channels);  // what a position gets
    const int64_t count = valid.count(n);
    for (int64_t c = 0; c < layout.channels; c++) counted[c] = static_cast<scalar_t>(grad_context.row(n)[c] / count);
    valid.for_each_piece(n, 0, layout.positions, [&](int64_t begin, int64_t end, bool counts) {
      const std::vector<scalar_t>& values = counts ? counted : zeros;
      scalar_t* sample = grad_x.data + n * layout.sample_stride;
      if (layout.channels_last) {
        for (int64_t p = begin; p < end; p++) std::copy(values.begin(), values.end(), sample + p * layout.position_stride);
      } else {
        for (int64_t c = 0; c < layout.channels; c++)
          std::fill_n(sample + c * layout.channel_stride + begin, end - begin, values[c]);
      }
    });
  });
}

}  // namespace gcnet_ext::cpu
