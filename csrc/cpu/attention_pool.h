// Attention pooling of samples of a feature map, and its backward pass, as the whole block uses them too.
#pragma once

#include "../plan_cpu.h"
#include "tensors.h"
#include "valid.h"

namespace gcnet_ext::cpu {

template <typename scalar_t>
PoolPlan pool_plan(const Map<const scalar_t>& x) {
  return plan_cpu_pool(x.layout.channels, x.layout.positions, sizeof(scalar_t), x.layout.channels_last);
}

// What the pool gets.
template <typename acc>
struct PoolInputs {
  const acc* weight;  // [C]; null for average pooling
  acc bias;
  Valid valid;
};

// context[n, c] = sum_p m_p x_cp with attention[n, p] = m = softmax(w . x_p + b) for samples first <= n < first + count, over the
// positions that count; elsewhere m is 0, and so is the context if there are none. A null weight means average pooling: attention
// is not written, and m is one over the number of positions that count.
template <typename scalar_t>
void pool_samples(const Map<const scalar_t>& x, const PoolInputs<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                  acc_t<scalar_t>* context, acc_t<scalar_t>* attention);

// From the sum over the positions of a sample that count to their mean, or back to the gradient of each.
template <typename acc>
void divide_by_count(const Valid& valid, int64_t sample, int64_t channels, acc* values);

// The gradient of the weight: one partial sum per sample and split, so that it does not depend on who computes what.
template <typename acc>
struct WeightGradient {
  int64_t parts = 0, channels = 0;
  Buffer<acc> partial;

  WeightGradient() = default;
  WeightGradient(int64_t samples, int64_t splits, int64_t channels)
      : parts(samples * splits), channels(channels), partial(zeros<acc>(samples * splits * channels)) {}
  acc* part(int64_t i) const { return partial ? partial.get() + i * channels : nullptr; }
  // From sum_p dl_p x_p to sum_p dl_p (x_p - ctx), for some channels of a part; their context, and sum_p dl_p of the part. Over
  // a sample dl adds up to zero but for its rounding errors, which would else be multiplied with all that the x_p have in
  // common.
  void subtract_context(int64_t i, int64_t c0, int64_t count, const acc* context, acc sum_dl) const;
  // The sum of all parts, in their order.
  std::vector<acc> total() const;
};

// What the backward pass of the pool gets: everything [N, C] or [N, P], of all samples.
template <typename acc>
struct PoolGradients {
  const acc* grad_context;
  const acc* context;
  const acc* attention;
  const acc* weight;
  const acc* scale;  // may be null
  Valid valid;
};

// dx = g*scale + the gradient through the pool, for those samples; g or dx may have null data. Attention pooling only.
template <typename scalar_t>
void pool_backward_samples(const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                           const PoolGradients<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                           const Map<scalar_t>& grad_x, const WeightGradient<acc_t<scalar_t>>& grad_weight);

// The same two for samples whose plan is by_channels.
template <typename scalar_t>
void pool_by_channels(const Map<const scalar_t>& x, const PoolInputs<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                      acc_t<scalar_t>* context, acc_t<scalar_t>* attention);
template <typename scalar_t>
void pool_backward_by_channels(const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                               const PoolGradients<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                               const Map<scalar_t>& grad_x, const WeightGradient<acc_t<scalar_t>>& grad_weight);

// dx = g*scale in a block, where a position does not count; zeros without data of g.
template <typename scalar_t>
void pass_by(Block<const scalar_t> grad, const acc_t<scalar_t>* scale, Block<scalar_t> grad_x) {
  if (!grad_x.data) return;
  if (grad.data) return map_kernels<scalar_t>().channel_fuse(grad, {scale, /*shift=*/nullptr}, grad_x);
  for (int64_t c = 0; c < grad_x.channels; c++) {
    for (int64_t p = 0; p < grad_x.positions; p++) {
      grad_x.data[c * grad_x.channel_stride + p * grad_x.position_stride] = scalar_t(0);
    }
  }
}

}  // namespace gcnet_ext::cpu
