// What the attention pool of a map gets, forward and backward, and what both ways to cut a sample share.
#pragma once

#include "tensors.h"
#include "valid.h"

namespace gcnet_ext::cpu {

// The 1x1 convolution of the pool; a null weight [C] means average pooling.
template <typename acc>
struct PoolMask {
  const acc* weight;
  acc bias;
};

template <typename acc>
struct PoolBackwardInputs {
  Matrix<const acc> grad_context, context;  // [N, C]
  Matrix<const acc> attention;              // [N, P]
  const acc* weight;                        // [C]
  Matrix<const acc> scale;                  // [N, C], what g is multiplied with; may be absent
  Valid valid;

  PoolBackwardInputs samples(int64_t first, int64_t count) const {
    return {grad_context.row_range(first, count), context.row_range(first, count),
            attention.row_range(first, count),    weight,
            scale.row_range(first, count),        valid.samples(first)};
  }
};

// dx = g*scale in a block whose positions do not count, or zeros without g.
template <typename scalar_t>
void grad_of_others(Block<const scalar_t> grad, const acc_t<scalar_t>* scale, Block<scalar_t> grad_x) {
  if (!grad_x.data) return;
  if (grad.data) return map_kernels<scalar_t>().channel_fuse(grad, {scale, /*shift=*/nullptr}, grad_x);
  for (int64_t c = 0; c < grad_x.channels; c++) {
    for (int64_t p = 0; p < grad_x.positions; p++) {
      grad_x.data[c * grad_x.channel_stride + p * grad_x.position_stride] = scalar_t(0);
    }
  }
}

// From sum_p dl_p x_p, a part of the gradient of the weight, to sum_p dl_p (x_p - ctx). Over a sample dl adds up to zero but
// for its rounding errors (sum_dl), which would else be multiplied with all that the x_p have in common.
template <typename acc>
void subtract_context(acc sum_dl, const acc* context, int64_t channels, acc* part) {
  if (!part) return;
  const acc factor = -sum_dl;
  const Block<const acc> one_position{context, channels, 1, /*channel_stride=*/1, /*position_stride=*/channels, true};
  map_kernels<acc>().channel_dots(one_position, &factor, part);
}

}  // namespace gcnet_ext::cpu
