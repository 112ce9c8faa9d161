// The attention pool of small or wide samples in NCHW: they are cut into blocks of channels, which are contiguous memory.
//
//   every block adds to the logits of all positions:       logit_p = sum of its w_c x_cp, over the blocks in their order
//   every block takes the sums of its channels:            ctx_c = sum_p m_p x_cp
//
// Threads that share a sample then read and write whole rows, and no cache line is written by two of them.
#pragma once

#include <limits>

#include "pool_inputs.h"
#include "sweep.h"

namespace gcnet_ext::cpu {

// parts[i, p] = sum_c w_nc x_ncp over the channels of the i-th block. They are not computed where a position does not count.
template <typename scalar_t>
MatrixBuffer<acc_t<scalar_t>> partial_dots(const Map<const scalar_t>& x, const SweepPlan& plan, const Valid& valid,
                                           Matrix<const acc_t<scalar_t>> w) {
  const auto position_dots = map_kernels<scalar_t>().position_dots;
  const int64_t positions = x.layout.positions;
  MatrixBuffer<acc_t<scalar_t>> parts(x.layout.samples * plan.channel_blocks, positions);
  const auto dots = [&](const SweepItem& item) {
    valid.for_each_run(item.sample, 0, positions, [&](int64_t begin, int64_t end) {
      position_dots(block_of(x, item, begin, end), channels_of(w, item), parts.row(item.i) + begin);
    });
  };
  for_each_block(plan, x.layout, dots, Order::backwards);  // the sweep that follows goes forwards, from what is in the caches
  return parts;
}

// dctx . ctx of one sample, added in the order in which partial_dots and the sum over its blocks add dctx . x_p.
template <typename acc>
acc context_dot(const SweepPlan& plan, const acc* grad_context, const acc* context, int64_t channels) {
  const auto dot_of_block = [&](int64_t c0) {
    const int64_t count = std::min(plan.channels, channels - c0);
    return vector_kernels<acc>().context_dot(grad_context + c0, context + c0, count, /*channels_last=*/false);
  };
  acc dot = dot_of_block(0);
  for (int64_t c0 = plan.channels; c0 < channels; c0 += plan.channels) dot += dot_of_block(c0);
  return dot;
}

template <typename scalar_t>
void pool_by_channels(const Map<const scalar_t>& x, const PoolMask<acc_t<scalar_t>>& mask, const Valid& valid,
                      Matrix<acc_t<scalar_t>> context, Matrix<acc_t<scalar_t>> attention) {
  using acc = acc_t<scalar_t>;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const int64_t samples = x.layout.samples, channels = x.layout.channels, positions = x.layout.positions;
  const SweepPlan plan = sweep_plan(x);
  const auto parts = partial_dots(x, plan, valid, {mask.weight, samples, channels, /*stride=*/0});
  const auto softmax_of_sum = vector_kernels<acc>().softmax_of_sum;
  parallel_for(samples, parts.rows * positions, [&](int64_t n) {
    const Matrix<acc> parts_of_n = parts.row_range(n * plan.channel_blocks, plan.channel_blocks);
    for (int64_t i = 0; i < parts_of_n.rows; i++) valid.fill_others(n, 0, positions, lowest, parts_of_n.row(i));
    softmax_of_sum(parts_of_n.data, parts_of_n.rows, positions, mask.bias, attention.row(n));
    valid.fill_others(n, 0, positions, acc(0), attention.row(n));
  });
  const auto channel_dots = map_kernels<scalar_t>().channel_dots;
  for_each_block(plan, x.layout, [&](const SweepItem& item) {
    acc* sums = channels_of(context, item);
    std::fill_n(sums, item.channels, acc(0));
    valid.for_each_run(item.sample, 0, positions, [&](int64_t begin, int64_t end) {
      channel_dots(block_of(x, item, begin, end), attention.row(item.sample) + begin, sums);
    });
  });
}

template <typename scalar_t>
void pool_backward_by_channels(const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                               const PoolBackwardInputs<acc_t<scalar_t>>& inputs, const Map<scalar_t>& grad_x,
                               Matrix<acc_t<scalar_t>> grad_weight_parts) {
  using acc = acc_t<scalar_t>;
  const int64_t samples = x.layout.samples, channels = x.layout.channels, positions = x.layout.positions;
  const SweepPlan plan = sweep_plan(x);
  const Valid& valid = inputs.valid;
  const auto parts = partial_dots(x, plan, valid, inputs.grad_context);
  const MatrixBuffer<acc> dl(samples, positions);
  const auto sum_dl = buffer<acc>(samples);
  const auto logit_gradient = vector_kernels<acc>().logit_gradient;
  parallel_for(samples, parts.rows * positions, [&](int64_t n) {
    const acc dot = context_dot(plan, inputs.grad_context.row(n), inputs.context.row(n), channels);
    const acc *u = parts.row(n * plan.channel_blocks), *m = inputs.attention.row(n);
    sum_dl[n] = 0;
    valid.for_each_run(n, 0, positions, [&](int64_t begin, int64_t end) {
      sum_dl[n] += logit_gradient(u + begin, plan.channel_blocks, positions, end - begin, m + begin, dot, dl.row(n) + begin);
    });
  });
  const auto pool_gradient = map_kernels<scalar_t>().pool_gradient;
  for_each_block(plan, x.layout, [&](const SweepItem& item) {
    const int64_t n = item.sample;
    const PoolBackwardSample<acc> of_block{channels_of(inputs.grad_context, item), /*context_dot=*/0, inputs.weight + item.c0,
                                           channels_of(inputs.scale, item)};
    acc* const dw = channels_of(grad_weight_parts, item);
    valid.for_each_piece(n, 0, positions, [&](int64_t begin, int64_t end, bool counts) {
      const auto g = block_of(grad, item, begin, end);
      const auto dx = block_of(grad_x, item, begin, end);
      if (!counts) return grad_of_others(g, of_block.scale, dx);
      pool_gradient(g, block_of(x, item, begin, end), inputs.attention.row(n) + begin, dl.row(n) + begin, of_block, dx, dw);
    });
    subtract_context(sum_dl[n], channels_of(inputs.context, item), item.channels, dw);
  });
}

}  // namespace gcnet_ext::cpu
