// attention_pool on the CPU.
//
// The positions of a sample are cut into splits and the splits into tiles (csrc/plan_cpu.h). A split keeps a running
// softmax-weighted sum over its tiles; the sums of the splits are then merged in their order. Small samples in NCHW go the way
// of attention_pool_by_channels.cpp.
#include "attention_pool.h"

#include <cmath>
#include <limits>

#include "channel_fuse.h"
#include "parallel.h"

namespace gcnet_ext::cpu {

template <typename acc>
void divide_by_count(const Valid& valid, int64_t sample, int64_t channels, acc* values) {
  const int64_t count = std::max<int64_t>(1, valid.count(sample));  // the sum over no position is 0
  for (int64_t c = 0; c < channels; c++) values[c] /= acc(count);
}

template <typename scalar_t>
void pool_samples(const Map<const scalar_t>& x, const PoolInputs<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                  acc_t<scalar_t>* context, acc_t<scalar_t>* attention) {
  using acc = acc_t<scalar_t>;
  const int64_t channels = x.layout.channels, positions = x.layout.positions, elements = count * channels * positions;
  const Valid& valid = given.valid;
  if (given.weight == nullptr) {
    sum_samples<scalar_t>(x, {}, valid, first, count, context, nullptr);
    for (int64_t n = first; n < first + count; n++) divide_by_count(valid, n, channels, context + n * channels);
    return;
  }
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const PoolPlan plan = pool_plan(x);
  if (plan.by_channels) {  // x is read twice: as many samples at a time as stay in the caches
    const int64_t sample_bytes = channels * positions * sizeof(scalar_t);
    return for_each_group(plan_groups(count, sample_bytes, 0), count, elements,
                          [&](int64_t n, int64_t some) { pool_by_channels(x, given, first + n, some, context, attention); });
  }
  const auto pool = map_kernels<scalar_t>().attention_pool;
  const auto softmax = vector_kernels<acc>().softmax;
  const auto weighted = buffer<acc>(count * plan.splits * channels);
  std::vector<SoftmaxSum<acc>> sums(count * plan.splits);

  parallel_for(count * plan.splits, elements, [&](int64_t i) {
    const int64_t sample = first + i / plan.splits, begin = i % plan.splits * plan.split;
    const int64_t end = std::min(begin + plan.split, positions);
    sums[i] = {lowest, acc(0), weighted.get() + i * channels};
    std::fill_n(sums[i].weighted, channels, acc(0));
    acc* const logits = attention + sample * positions;
    for (int64_t p = begin; p < end; p += plan.tile) {
      valid.for_each_run(sample, p, std::min(p + plan.tile, end), [&](int64_t p0, int64_t p1) {
        pool(x.block(sample, 0, channels, p0, p1 - p0), given.weight, given.bias, logits + p0, sums[i]);
      });
    }
  });

  // Merging: every item computes the total of its sample's splits, then its own part of the context and of the attention.
  parallel_for(count * plan.splits, count * (plan.splits * channels + positions), [&](int64_t i) {
    const int64_t sample = first + i / plan.splits, split = i % plan.splits;
    const SoftmaxSum<acc>* parts = sums.data() + i / plan.splits * plan.splits;
    acc max = lowest, sum = 0;
    for (int64_t s = 0; s < plan.splits; s++) max = parts[s].max > max ? parts[s].max : max;
    const acc reference = max == lowest ? acc(0) : max;
    for (int64_t s = 0; s < plan.splits; s++) sum += parts[s].sum * std::exp(parts[s].max - reference);

    const int64_t c0 = channels * split / plan.splits, c1 = channels * (split + 1) / plan.splits;
    acc* total = context + sample * channels;
    std::fill(total + c0, total + c1, acc(0));
    acc* const m = attention + sample * positions;
    const int64_t begin = split * plan.split, end = std::min(begin + plan.split, positions);
    valid.fill_others(sample, begin, end, acc(0), m);
    if (valid && valid.count(sample) == 0) return;
    for (int64_t s = 0; s < plan.splits; s++) {
      const acc factor = std::exp(parts[s].max - reference) / sum;
      for (int64_t c = c0; c < c1; c++) total[c] += parts[s].weighted[c] * factor;
    }
    valid.for_each_run(sample, begin, end, [&](int64_t p0, int64_t p1) { softmax(m + p0, p1 - p0, max, sum); });
  });
}

template <typename acc>
void WeightGradient<acc>::subtract_context(int64_t i, int64_t c0, int64_t count, const acc* context, acc sum_dl) const {
  if (!partial) return;
  const acc factor = -sum_dl;
  const Block<const acc> one_position{context, count, 1, /*channel_stride=*/1, /*position_stride=*/count, true};
  map_kernels<acc>().channel_dots(one_position, &factor, part(i) + c0);
}

template <typename acc>
std::vector<acc> WeightGradient<acc>::total() const {
  std::vector<acc> sum(channels);
  constexpr int64_t kSlice = 64;  // channels of one item
  const int64_t slices = (channels + kSlice - 1) / kSlice;
  parallel_for(slices, parts * channels, [&](int64_t slice) {
    const int64_t end = std::min(channels, (slice + 1) * kSlice);
    for (int64_t i = 0; i < parts; i++) {
      for (int64_t c = slice * kSlice; c < end; c++) sum[c] += partial[i * channels + c];
    }
  });
  return sum;
}

template <typename scalar_t>
void pool_backward_samples(const Map<const scalar_t>& grad, const Map<const scalar_t>& x,
                           const PoolGradients<acc_t<scalar_t>>& given, int64_t first, int64_t count,
                           const Map<scalar_t>& grad_x, const WeightGradient<acc_t<scalar_t>>& grad_weight) {
  using acc = acc_t<scalar_t>;
  const int64_t channels = x.layout.channels, positions = x.layout.positions;
  const PoolPlan plan = pool_plan(x);
  if (plan.by_channels) return pool_backward_by_channels(grad, x, given, first, count, grad_x, grad_weight);
  const auto pool_backward = map_kernels<scalar_t>().attention_pool_backward;
  const auto split = [&](int64_t i) {
    const int64_t sample = first + i / plan.splits, begin = i % plan.splits * plan.split;
    const int64_t end = std::min(begin + plan.split, positions), row = sample * channels;
    const acc context_dot =
        vector_kernels<acc>().context_dot(given.grad_context + row, given.context + row, channels, x.layout.channels_last);
    const PoolBackwardSample<acc> of_sample{given.grad_context + row, context_dot, given.weight,
                                            given.scale ? given.scale + row : nullptr};
    const int64_t part = sample * plan.splits + i % plan.splits;
    acc sum_dl = 0;
    for (int64_t p = begin; p < end; p += plan.tile) {
      given.valid.for_each_piece(sample, p, std::min(p + plan.tile, end), [&](int64_t p0, int64_t p1, bool counts) {
        const auto g = grad.block(sample, 0, channels, p0, p1 - p0);
        const auto dx = grad_x.block(sample, 0, channels, p0, p1 - p0);
        if (!counts) return pass_by(g, of_sample.scale, dx);
        sum_dl += pool_backward(g, x.block(sample, 0, channels, p0, p1 - p0), given.attention + sample * positions + p0,
                                of_sample, dx, grad_weight.part(part));
      });
    }
    grad_weight.subtract_context(part, 0, channels, given.context + row, sum_dl);
  };
  parallel_for(count * plan.splits, count * channels * positions, split, Order::backwards);
}

template void divide_by_count(const Valid&, int64_t, int64_t, double*);
template void divide_by_count(const Valid&, int64_t, int64_t, float*);
template struct WeightGradient<double>;
template struct WeightGradient<float>;
#define GCNET_EXT_INSTANTIATE(scalar_t)                                                                              \
  template void pool_samples(const Map<const scalar_t>&, const PoolInputs<acc_t<scalar_t>>&, int64_t, int64_t,       \
                             acc_t<scalar_t>*, acc_t<scalar_t>*);                                                    \
  template void pool_backward_samples(const Map<const scalar_t>&, const Map<const scalar_t>&,                        \
                                      const PoolGradients<acc_t<scalar_t>>&, int64_t, int64_t, const Map<scalar_t>&, \
                                      const WeightGradient<acc_t<scalar_t>>&);
GCNET_EXT_INSTANTIATE(double)
GCNET_EXT_INSTANTIATE(float)
GCNET_EXT_INSTANTIATE(Half)
GCNET_EXT_INSTANTIATE(BFloat16)
#undef GCNET_EXT_INSTANTIATE

namespace {

std::tuple<Tensor, Tensor> attention_pool(const Tensor& x_in, const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& valid) {
  check_attention_pool("attention_pool", x_in, {weight, bias}, valid);
  const Tensor x = native(x_in);
  const int64_t samples = x.size(0), count = positions(x);
  const Tensor context = empty(x, {samples, x.size(1)}, accumulation_dtype(x));
  const Tensor attention = empty(x, {samples, weight ? count : 0}, accumulation_dtype(x));
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto w = to_acc<acc>(weight), b = to_acc<acc>(bias);
    const auto map = read_map<scalar_t>(x);
    const PoolInputs<acc> given{pointer(w), b.empty() ? acc(0) : b[0], Valid(valid, count)};
    const GroupPlan group = plan_groups(samples, x.size(1) * count * sizeof(scalar_t), 0);
    for_each_group(group, samples, x.numel(), [&](int64_t first, int64_t n) {
      pool_samples(map, given, first, n, mutable_data<acc>(context), mutable_data<acc>(attention));
    });
  });
  return {context, attention};
}

// dx = dctx over the number of positions that count, at those positions, and 0 elsewhere.
void average_pool_backward(const Tensor& grad_context, const OptionalTensor& valid_in, const Tensor& grad_x) {
  dispatch(grad_x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    const Layout layout = layout_of(grad_x);
    const auto* dctx = data<acc_t<scalar_t>>(grad_context);
    auto* dx = mutable_data<scalar_t>(grad_x);
    const Valid valid(valid_in, layout.positions);
    parallel_for(layout.samples, grad_x.numel(), [&](int64_t n) {
      const int64_t count = valid.count(n);
      for (int64_t c = 0; c < layout.channels; c++) {
        const scalar_t value = static_cast<scalar_t>(dctx[n * layout.channels + c] / count);
        scalar_t* start = dx + n * layout.sample_stride + c * layout.channel_stride;
        valid.for_each_piece(n, 0, layout.positions, [&](int64_t begin, int64_t end, bool counts) {
          for (int64_t p = begin; p < end; p++) start[p * layout.position_stride] = counts ? value : scalar_t(0);
        });
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_pool_backward(const Tensor& grad_context_in, const Tensor& x_in,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const OptionalTensor& valid, const Tensor& context_in,
                                                           const Tensor& attention_in, const std::vector<bool>& needs) {
  check_attention_pool_backward(grad_context_in, x_in, {weight, bias}, valid, context_in, attention_in, needs);
  const bool need_x = needs[0], need_weight = needs[1];
  const Tensor grad_context = dense(grad_context_in), context = dense(context_in), attention = dense(attention_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_weight = gradient_of(need_weight, weight, x_in), grad_bias = zero_gradient_of(needs[2], bias, x_in);
  if (!weight) {
    if (need_x) average_pool_backward(grad_context, valid, grad_x);
    return {grad_x, grad_weight, grad_bias};
  }
  if (!need_x && !need_weight) return {grad_x, grad_weight, grad_bias};
  const Tensor x = native(x_in);
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto w = to_acc<acc>(weight);
    const auto map = read_map<scalar_t>(x);
    const PoolPlan plan = pool_plan(map);
    const auto partial = need_weight ? WeightGradient<acc>(x.size(0), plan.splits, x.size(1)) : WeightGradient<acc>();
    const PoolGradients<acc> given{data<acc>(grad_context), data<acc>(context),
                                   data<acc>(attention),    w.data(),
                                   /*scale=*/nullptr,       Valid(valid, map.layout.positions)};
    const auto grad_x_map = write_map_if<scalar_t>(need_x, grad_x, x);
    const GroupPlan group = plan_groups(x.size(0), x.size(1) * positions(x) * sizeof(scalar_t), 0);
    for_each_group(group, x.size(0), x.numel(), [&](int64_t first, int64_t count) {
      pool_backward_samples<scalar_t>({}, map, given, first, count, grad_x_map, partial);
    });
    if (need_weight) from_acc(partial.total().data(), grad_weight);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("attention_pool", TORCH_BOX(&gcnet_ext::cpu::attention_pool));
  m.impl("attention_pool_backward", TORCH_BOX(&gcnet_ext::cpu::attention_pool_backward));
}
