// attention_pool on the CPU, of small or wide samples in NCHW: cut into blocks of channels, which are contiguous memory.
//
//   every block adds to the logits of all positions:       logit_p = sum of its w_c x_cp, over the blocks in their order
//   every block takes the sums of its channels:            ctx_c = sum_p m_p x_cp
//
// Threads that share a sample then read and write whole rows, and no cache line is written by two of them.
#include "attention_pool.h"

#include <limits>

#include "sweep.h"

namespace gcnet_ext::cpu {
namespace {

// parts[i, p] = sum_c w_nc x_ncp over the channels of the i-th block; w [N, C], or [C] with a stride of 0 for all samples.
// They are not computed where a position does not count.
template <typename scalar_t>
Buffer<acc_t<scalar_t>> partial_dots(const Map<const scalar_t>& x, const SweepPlan& plan, const Valid& valid,
                                     const acc_t<scalar_t>* w, int64_t w_stride, int64_t first, int64_t count) {
  using acc = acc_t<scalar_t>;
  const auto position_dots = map_kernels<scalar_t>().position_dots;
  const int64_t positions = x.layout.positions;
  auto parts = buffer<acc>(count * plan.channel_blocks * positions);
  const auto dots = [&](const SweepItem& item) {
    acc* const part = parts.get() + item.i * positions;
    valid.for_each_run(item.sample, 0, positions, [&](int64_t begin, int64_t end) {
      position_dots(block_of(x, item, begin, end), w + item.sample * w_stride + item.c0, part + begin);
    });
  };
  for_each_block(plan, x.layout, first, count, dots, Order::backwards);  // what follows goes forwards again
  return parts;
}

// dctx . ctx of one sample, added as partial_dots and the sum over its blocks add dctx . x_p.
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

}  // namespace

template <typename scalar_t>
void pool_by_channels(const Map<const scalar_t>& x, const PoolInputs<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                      acc_t<scalar_t>* context, acc_t<scalar_t>* attention) {
  constexpr auto lowest = -std::numeric_limits<acc_t<scalar_t>>::infinity();
  const Valid& valid = given.valid;
  const int64_t channels = x.layout.channels, positions = x.layout.positions;
  const SweepPlan plan = sweep_plan(x);
  const int64_t parts_size = plan.channel_blocks * positions;
  const auto parts = partial_dots(x, plan, valid, given.weight, 0, first, count);
  const auto softmax_of_sum = vector_kernels<acc_t<scalar_t>>().softmax_of_sum;
  parallel_for(count, count * parts_size, [&](int64_t i) {
    acc_t<scalar_t>* m = attention + (first + i) * positions;
    for (int64_t part = 0; part < plan.channel_blocks; part++) {
      valid.fill_others(first + i, 0, positions, lowest, parts.get() + i * parts_size + part * positions);
    }
    softmax_of_sum(parts.get() + i * parts_size, plan.channel_blocks, positions, given.bias, m);
    valid.fill_others(first + i, 0, positions, acc_t<scalar_t>(0), m);
  });
  const auto channel_dots = map_kernels<scalar_t>().channel_dots;
  for_each_block(plan, x.layout, first, count, [&](const SweepItem& item) {
    acc_t<scalar_t>* sums = context + item.sample * channels + item.c0;
    std::fill_n(sums, item.channels, acc_t<scalar_t>(0));
    valid.for_each_run(item.sample, 0, positions, [&](int64_t begin, int64_t end) {
      channel_dots(block_of(x, item, begin, end), attention + item.sample * positions + begin, sums);
    });
  });
}

template <typename scalar_t>
void pool_backward_by_channels(const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                               const PoolGradients<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                               const Map<scalar_t>& grad_x, const WeightGradient<acc_t<scalar_t>>& grad_weight) {
  using acc = acc_t<scalar_t>;
  const int64_t channels = x.layout.channels, positions = x.layout.positions;
  const SweepPlan plan = sweep_plan(x);
  const int64_t parts_size = plan.channel_blocks * positions;
  const Valid& valid = given.valid;
  const auto parts = partial_dots(x, plan, valid, given.grad_context, channels, first, count);
  const auto dl = buffer<acc>(count * positions), sum_dl = buffer<acc>(count);
  const auto logit_gradient = vector_kernels<acc>().logit_gradient;
  parallel_for(count, count * parts_size, [&](int64_t i) {
    const int64_t row = (first + i) * channels;
    const acc dot = context_dot(plan, given.grad_context + row, given.context + row, channels);
    const acc *u = parts.get() + i * parts_size, *m = given.attention + (first + i) * positions;
    sum_dl[i] = 0;
    valid.for_each_run(first + i, 0, positions, [&](int64_t begin, int64_t end) {
      sum_dl[i] += logit_gradient(u + begin, plan.channel_blocks, positions, end - begin, m + begin, dot,
                                  dl.get() + i * positions + begin);
    });
  });
  const auto pool_gradient = map_kernels<scalar_t>().pool_gradient;
  for_each_block(plan, x.layout, first, count, [&](const SweepItem& item) {
    const int64_t row = item.sample * channels + item.c0;
    const PoolBackwardSample<acc> of_block{given.grad_context + row, /*context_dot=*/0, given.weight + item.c0,
                                           given.scale ? given.scale + row : nullptr};
    acc* dw = grad_weight.part(item.sample);
    valid.for_each_piece(item.sample, 0, positions, [&](int64_t begin, int64_t end, bool counts) {
      const auto g = block_of(grad, item, begin, end);
      const auto dx = block_of(grad_x, item, begin, end);
      if (!counts) return pass_by(g, of_block.scale, dx);
      pool_gradient(g, block_of(x, item, begin, end), given.attention + item.sample * positions + begin,
                    dl.get() + (item.sample - first) * positions + begin, of_block, dx, dw ? dw + item.c0 : nullptr);
    });
    grad_weight.subtract_context(item.sample, item.c0, item.channels, given.context + row, sum_dl[item.sample - first]);
  });
}

#define GCNET_EXT_INSTANTIATE(scalar_t)                                                                                  \
  template void pool_by_channels(const Map<const scalar_t>&, const PoolInputs<acc_t<scalar_t>>&, int64_t, int64_t,       \
                                 acc_t<scalar_t>*, acc_t<scalar_t>*);                                                    \
  template void pool_backward_by_channels(const Map<const scalar_t>&, const Map<const scalar_t>&,                        \
                                          const PoolGradients<acc_t<scalar_t>>&, int64_t, int64_t, const Map<scalar_t>&, \
                                          const WeightGradient<acc_t<scalar_t>>&);
GCNET_EXT_INSTANTIATE(double)
GCNET_EXT_INSTANTIATE(float)
GCNET_EXT_INSTANTIATE(Half)
GCNET_EXT_INSTANTIATE(BFloat16)
#undef GCNET_EXT_INSTANTIATE

}  // namespace gcnet_ext::cpu
