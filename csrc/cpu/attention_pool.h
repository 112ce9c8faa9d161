// The attention pool of a map's samples, and its backward pass, as attention_pool and the whole block use them.
#pragma once

#include "average_pool.h"
#include "pool_by_channels.h"
#include "pool_by_positions.h"

namespace gcnet_ext::cpu {

template <typename scalar_t>
PoolPlan pool_plan(const Map<const scalar_t>& x) {
  return plan_cpu_pool(x.layout.channels, x.layout.positions, sizeof(scalar_t), x.layout.channels_last);
}

// context[n, c] = sum_p m_p x_cp with attention[n, p] = m = softmax(w . x_p + b) over the positions that count; elsewhere m is
// 0, and so is the context if there are none. In average pooling attention is not written, and m is one over the number of
// positions that count.
template <typename scalar_t>
void pool_samples(const Map<const scalar_t>& x, const PoolMask<acc_t<scalar_t>>& mask, const Valid& valid,
                  Matrix<acc_t<scalar_t>> context, Matrix<acc_t<scalar_t>> attention) {
  if (!mask.weight) return average_samples(x, valid, context);
  const PoolPlan plan = pool_plan(x);
  if (!plan.by_channels) return pool_by_positions(plan, x, mask, valid, context, attention);
  // x is read twice, so as many samples go at a time as stay in the caches.
  for_each_group(x.layout, sizeof(scalar_t), /*weight_bytes=*/0, [&](int64_t first, int64_t count) {
    pool_by_channels(x.samples(first, count), mask, valid.samples(first), context.row_range(first, count),
                     attention.row_range(first, count));
  });
}

// The parts of the mask weight's gradient, which are zero before the backward pass: one for every split of every sample, so
// that their sum does not depend on who computes what.
template <typename acc>
MatrixBuffer<acc> grad_weight_parts(const PoolPlan& plan, const Layout& layout, bool needed) {
  MatrixBuffer<acc> parts(layout.samples * plan.splits, layout.channels, needed);
  parts.clear();
  return parts;
}

// dx = g*scale + the gradient through attention pooling. g, dx or grad_weight_parts (of these samples) may be absent.
template <typename scalar_t>
void pool_backward_samples(const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                           const PoolBackwardInputs<acc_t<scalar_t>>& inputs, const Map<scalar_t>& grad_x,
                           Matrix<acc_t<scalar_t>> grad_weight_parts) {
  const PoolPlan plan = pool_plan(x);
  if (plan.by_channels) return pool_backward_by_channels(grad, x, inputs, grad_x, grad_weight_parts);
  pool_backward_by_positions(plan, grad, x, inputs, grad_x, grad_weight_parts);
}

// The gradient of the mask's weight: the sum of all parts, in their order.
template <typename acc>
void sum_grad_weight_parts(Matrix<const acc> parts, const Tensor& gradient) {
  std::vector<acc> sum(parts.columns);
  constexpr int64_t kSlice = 64;  // channels of one item
  const int64_t slices = (parts.columns + kSlice - 1) / kSlice;
  parallel_for(slices, parts.rows * parts.columns, [&](int64_t slice) {
    const int64_t end = std::min(parts.columns, (slice + 1) * kSlice);
    for (int64_t i = 0; i < parts.rows; i++) {
      for (int64_t c = slice * kSlice; c < end; c++) sum[c] += parts.row(i)[c];
    }
  });
  from_acc(sum.data(), gradient);
}

}  // namespace gcnet_ext::cpu
