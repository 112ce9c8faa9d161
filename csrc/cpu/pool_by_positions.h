// The attention pool of samples that are cut by positions.
//
// The positions of a sample are cut into splits and the splits into tiles (csrc/plan_cpu.h). A split keeps a running
// softmax-weighted sum over its tiles; the sums of the splits are then merged in their order.
#pragma once

#include <cmath>
#include <limits>

#include "parallel.h"
#include "pool_inputs.h"

namespace gcnet_ext::cpu {

template <typename scalar_t>
void pool_by_positions(const PoolPlan& plan, const Map<const scalar_t>& x, const PoolMask<acc_t<scalar_t>>& mask,
                       const Valid& valid, Matrix<acc_t<scalar_t>> context, Matrix<acc_t<scalar_t>> attention) {
  using acc = acc_t<scalar_t>;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const int64_t samples = x.layout.samples, channels = x.layout.channels, positions = x.layout.positions;
  const auto pool = map_kernels<scalar_t>().attention_pool;
  const auto softmax = vector_kernels<acc>().softmax;
  const MatrixBuffer<acc> weighted(samples * plan.splits, channels);
  std::vector<SoftmaxSum<acc>> sums(samples * plan.splits);

  parallel_for(samples * plan.splits, samples * channels * positions, [&](int64_t i) {
    const int64_t sample = i / plan.splits, begin = i % plan.splits * plan.split;
    const int64_t end = std::min(begin + plan.split, positions);
    sums[i] = {lowest, acc(0), weighted.row(i)};
    std::fill_n(sums[i].weighted, channels, acc(0));
    acc* const logits = attention.row(sample);
    for (int64_t p = begin; p < end; p += plan.tile) {
      valid.for_each_run(sample, p, std::min(p + plan.tile, end), [&](int64_t p0, int64_t p1) {
        pool(x.block(sample, 0, channels, p0, p1 - p0), mask.weight, mask.bias, logits + p0, sums[i]);
      });
    }
  });

  // Merging: every item computes the total of its sample's splits, then its own part of the context and of the attention.
  parallel_for(samples * plan.splits, samples * (plan.splits * channels + positions), [&](int64_t i) {
    const int64_t sample = i / plan.splits, split = i % plan.splits;
    const SoftmaxSum<acc>* parts = sums.data() + sample * plan.splits;
    acc max = lowest, sum = 0;
    for (int64_t s = 0; s < plan.splits; s++) max = parts[s].max > max ? parts[s].max : max;
    const acc reference = max == lowest ? acc(0) : max;
    for (int64_t s = 0; s < plan.splits; s++) sum += parts[s].sum * std::exp(parts[s].max - reference);

    const int64_t c0 = channels * split / plan.splits, c1 = channels * (split + 1) / plan.splits;
    acc* total = context.row(sample);
    std::fill(total + c0, total + c1, acc(0));
    acc* const m = attention.row(sample);
    const int64_t begin = split * plan.split, end = std::min(begin + plan.split, positions);
    valid.fill_others(sample, begin, end, acc(0), m);
    if (valid && valid.count(sample) == 0) return;
    for (int64_t s = 0; s < plan.splits; s++) {
      const acc rescale = std::exp(parts[s].max - reference) / sum;
      for (int64_t c = c0; c < c1; c++) total[c] += parts[s].weighted[c] * rescale;
    }
    valid.for_each_run(sample, begin, end, [&](int64_t p0, int64_t p1) { softmax(m + p0, p1 - p0, max, sum); });
  });
}

template <typename scalar_t>
void pool_backward_by_positions(const PoolPlan& plan, const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                                const PoolBackwardInputs<acc_t<scalar_t>>& inputs, const Map<scalar_t>& grad_x,
                                Matrix<acc_t<scalar_t>> grad_weight_parts) {
  using acc = acc_t<scalar_t>;
  const int64_t samples = x.layout.samples, channels = x.layout.channels, positions = x.layout.positions;
  const auto pool_backward = map_kernels<scalar_t>().attention_pool_backward;
  const auto split = [&](int64_t i) {
    const int64_t sample = i / plan.splits, begin = i % plan.splits * plan.split;
    const int64_t end = std::min(begin + plan.split, positions);
    const acc *dctx = inputs.grad_context.row(sample), *context = inputs.context.row(sample);
    const acc context_dot = vector_kernels<acc>().context_dot(dctx, context, channels, x.layout.channels_last);
    const PoolBackwardSample<acc> of_sample{dctx, context_dot, inputs.weight, inputs.scale.row(sample)};
    acc sum_dl = 0;
    for (int64_t p = begin; p < end; p += plan.tile) {
      inputs.valid.for_each_piece(sample, p, std::min(p + plan.tile, end), [&](int64_t p0, int64_t p1, bool counts) {
        const auto g = grad.block(sample, 0, channels, p0, p1 - p0);
        const auto dx = grad_x.block(sample, 0, channels, p0, p1 - p0);
        if (!counts) return grad_of_others(g, of_sample.scale, dx);
        sum_dl += pool_backward(g, x.block(sample, 0, channels, p0, p1 - p0), inputs.attention.row(sample) + p0, of_sample, dx,
                                grad_weight_parts.row(i));
      });
    }
    subtract_context(sum_dl, context, channels, grad_weight_parts.row(i));
  };
  parallel_for(samples * plan.splits, samples * channels * positions, split, Order::backwards);
}

}  // namespace gcnet_ext::cpu
