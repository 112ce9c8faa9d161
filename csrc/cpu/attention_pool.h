// Attention pooling of samples of a feature map, and its backward pass, as the whole block uses them too.
#pragma once

#include "../plan_cpu.h"
#include "tensors.h"

namespace gcnet_ext::cpu {

template <typename scalar_t>
PoolPlan pool_plan(const Map<const scalar_t>& x) {
  return plan_cpu_pool(x.layout.channels, x.layout.positions, sizeof(scalar_t), x.layout.channels_last);
}

// context[n, c] = sum_p m_p x_cp with attention[n, p] = m = softmax(w . x_p + b) for samples first <= n < first + count.
// A null weight means average pooling: m = 1/P, and attention is not written.
template <typename scalar_t>
void pool_samples(const Map<const scalar_t>& x, const acc_t<scalar_t>* weight, acc_t<scalar_t> bias, int64_t first,
                  int64_t count, acc_t<scalar_t>* context, acc_t<scalar_t>* attention);

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
};

// dx = g*scale + the gradient through the pool, for those samples; g or dx may have null data. Attention pooling only.
template <typename scalar_t>
void pool_backward_samples(const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                           const PoolGradients<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                           const Map<scalar_t>& grad_x, const WeightGradient<acc_t<scalar_t>>& grad_weight);

// The same two for samples whose plan is by_channels.
template <typename scalar_t>
void pool_by_channels(const Map<const scalar_t>& x, const acc_t<scalar_t>* weight, acc_t<scalar_t> bias, int64_t first,
                      int64_t count, acc_t<scalar_t>* context, acc_t<scalar_t>* attention);
template <typename scalar_t>
void pool_backward_by_channels(const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                               const PoolGradients<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                               const Map<scalar_t>& grad_x, const WeightGradient<acc_t<scalar_t>>& grad_weight);

}  // namespace gcnet_ext::cpu
