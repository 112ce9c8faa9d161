// channel_fuse on the CPU: out = relu(x*scale + shift + residual), and its gradients.
#include "channel_fuse.h"

#include "sweep.h"

namespace gcnet_ext::cpu {
template <typename scalar_t>
void fuse_samples(const Map<const scalar_t>& x, const Fusions<scalar_t>& fusions, int64_t first, int64_t count,
                  const Map<scalar_t>& out) {
  const auto fuse = map_kernels<scalar_t>().channel_fuse;
  const auto fuse_block = [&](const SweepItem& item) {
    const int64_t row = item.sample * x.layout.channels + item.c0;
    const Fusion<scalar_t> fusion{.scale = fusions.scale ? fusions.scale + row : nullptr,
                                  .shift = fusions.shift ? fusions.shift + row : nullptr,
                                  .residual = block_of(fusions.residual, item),
                                  .relu = fusions.relu,
                                  .positive = fusions.positive.block(x.layout, item.sample, item.c0, item.p0)};
    fuse(block_of(x, item), fusion, block_of(out, item));
  };
  for_each_block(sweep_plan(x), x.layout, first, count, fuse_block, Order::backwards);
}

template <typename scalar_t>
void average_backward_samples(const Map<const scalar_t>& grad, const acc_t<scalar_t>* scale, const acc_t<scalar_t>* shift,
                              const Valid& valid, int64_t first, int64_t count, const Map<scalar_t>& grad_x) {
  const auto fuse = map_kernels<scalar_t>().channel_fuse;
  const auto fuse_block = [&](const SweepItem& item) {
    const int64_t row = item.sample * grad.layout.channels + item.c0;
    valid.for_each_piece(item.sample, item.p0, item.p0 + item.positions, [&](int64_t begin, int64_t end, bool counts) {
      fuse(block_of(grad, item, begin, end), {scale ? scale + row : nullptr, counts ? shift + row : nullptr},
           block_of(grad_x, item, begin, end));
    });
  };
  for_each_block(sweep_plan(grad), grad.layout, first, count, fuse_block, Order::backwards);
}

template <typename scalar_t>
void relu_backward_block(const ThroughRelu<scalar_t>& relu, const SweepItem& item) {
  map_kernels<scalar_t>().relu_backward(block_of(relu.grad, item),
                                        relu.positive.block(relu.grad.layout, item.sample, item.c0, item.p0),
                                        block_of(relu.masked, item));
}

template <typename scalar_t>
void relu_backward_samples(const ThroughRelu<scalar_t>& relu, int64_t first, int64_t count) {
  for_each_block(sweep_plan(relu.grad), relu.grad.layout, first, count,
                 [&](const SweepItem& item) { relu_backward_block(relu, item); });
}

template <typename scalar_t>
void sum_samples(const Map<const scalar_t>& a, const Map<const scalar_t>& b, const Valid& valid, int64_t first, int64_t count,
                 acc_t<scalar_t>* sum_a, acc_t<scalar_t>* sum_ab, const ThroughRelu<scalar_t>& relu) {
  using acc = acc_t<scalar_t>;
  const int64_t channels = a.layout.channels;
  const SweepPlan plan = sweep_plan(a);
  const auto sums = map_kernels<scalar_t>().channel_sums;
  const int64_t blocks = plan.position_blocks;
  // One partial sum per block of positions, then added in their order.
  const auto partial = buffer<acc>(2 * count * blocks * channels);
  for_each_block(plan, a.layout, first, count, [&](const SweepItem& item) {
    acc* part = partial.get() + 2 * ((item.sample - first) * blocks + item.position_block) * channels + item.c0;
    std::fill_n(part, item.channels, acc(0));
    std::fill_n(part + channels, item.channels, acc(0));
    if (relu.masked.data) relu_backward_block(relu, item);
    valid.for_each_run(item.sample, item.p0, item.p0 + item.positions, [&](int64_t begin, int64_t end) {
      sums(block_of(a, item, begin, end), block_of(b, item, begin, end), sum_a ? part : nullptr,
           sum_ab ? part + channels : nullptr);
    });
  });
  parallel_for(count, count * blocks * channels, [&](int64_t i) {
    const acc* part = partial.get() + 2 * i * blocks * channels;
    const auto merge = [&](acc* total, const acc* parts) {
      std::fill_n(total, channels, acc(0));
      for (int64_t block = 0; block < blocks; block++) {
        for (int64_t c = 0; c < channels; c++) total[c] += parts[2 * block * channels + c];
      }
    };
    if (sum_a) merge(sum_a + (first + i) * channels, part);
    if (sum_ab) merge(sum_ab + (first + i) * channels, part + channels);
  });
}

Tensor masked_gradient(const Tensor& x, const Tensor& grad_residual, const Tensor& grad_x) {
  return grad_residual.numel() > 0 ? grad_residual : grad_x.numel() > 0 ? grad_x : empty_like_map(x);
}

#define GCNET_EXT_INSTANTIATE(scalar_t)                                                                                     \
  template void fuse_samples(const Map<const scalar_t>&, const Fusions<scalar_t>&, int64_t, int64_t, const Map<scalar_t>&); \
  template void average_backward_samples(const Map<const scalar_t>&, const acc_t<scalar_t>*, const acc_t<scalar_t>*,        \
                                         const Valid&, int64_t, int64_t, const Map<scalar_t>&);                             \
  template void relu_backward_samples(const ThroughRelu<scalar_t>&, int64_t, int64_t);                                      \
  template void sum_samples(const Map<const scalar_t>&, const Map<const scalar_t>&, const Valid&, int64_t, int64_t,         \
                            acc_t<scalar_t>*, acc_t<scalar_t>*, const ThroughRelu<scalar_t>&);
GCNET_EXT_INSTANTIATE(double)
GCNET_EXT_INSTANTIATE(float)
GCNET_EXT_INSTANTIATE(Half)
GCNET_EXT_INSTANTIATE(BFloat16)
#undef GCNET_EXT_INSTANTIATE

namespace {

// x and out are native; out may be x. The bits of a ReLU are written to `positive` if it has room for them.
void fuse_into(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual_in,
               bool relu, const Tensor& out, const Tensor& positive) {
  const OptionalTensor residual = residual_of(residual_in, x, /*in_place=*/out.data_ptr() == x.data_ptr());
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    const auto scales = to_acc<acc_t<scalar_t>>(scale), shifts = to_acc<acc_t<scalar_t>>(shift);
    const auto map = read_map<scalar_t>(x);
    const Fusions<scalar_t> fusions{pointer(scales), pointer(shifts), read_map<scalar_t>(residual), relu,
                                    bits_of<uint8_t>(positive, map.layout)};
    fuse_samples(map, fusions, 0, x.size(0), write_map<scalar_t>(out, x));
  });
}

std::tuple<Tensor, Tensor> channel_fuse(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                        const OptionalTensor& residual, int64_t final_activation) {
  check_channel_fuse("channel_fuse", x, scale, shift, residual, final_activation);
  const bool relu = final_activation != 0;
  const Tensor out = empty_like_map(x), positive = empty_bits(x, relu);
  fuse_into(native(x), scale, shift, residual, relu, out, positive);
  return {out, positive};
}

void channel_fuse_(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
                   int64_t final_activation) {
  check_channel_fuse("channel_fuse_", x, scale, shift, residual, final_activation);
  check::in_place("channel_fuse_", x, residual);
  if (!scale && !shift && !residual && final_activation == 0) return;
  const Tensor map = native(x);
  fuse_into(map, scale, shift, residual, final_activation != 0, map, empty_bits(x, false));
  write_back(map, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_fuse_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                 const OptionalTensor& scale, const OptionalTensor& shift,
                                                                 int64_t final_activation, const Tensor& positive_in,
                                                                 const std::vector<bool>& needs) {
  check_channel_fuse_backward(grad_in, x_in, scale, shift, final_activation, positive_in, needs);
  const bool relu = final_activation != 0, need_x = needs[0], need_scale = needs[1] && scale, need_shift = needs[2] && shift;
  const Tensor grad = native_like(grad_in, x_in), x = native(x_in), positive = dense(positive_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_residual = needs[3] && relu ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_scale = gradient_of(need_scale, scale, x), grad_shift = gradient_of(need_shift, shift, x);
  const Tensor through = relu ? masked_gradient(x_in, grad_residual, grad_x) : grad;
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto scales = to_acc<acc>(scale);
    std::vector<acc> sum_g(need_shift ? x.size(0) * x.size(1) : 0), sum_gx(need_scale ? x.size(0) * x.size(1) : 0);
    const auto g = read_map<scalar_t>(through), x_map = read_map<scalar_t>(x);
    const auto before_relu = through_relu<scalar_t>(relu, grad, positive, through);
    const auto grad_x_map = write_map_if<scalar_t>(need_x, grad_x, through, x);
    const int64_t sample_bytes = 2 * x.size(1) * positions(x) * sizeof(scalar_t);
    const GroupPlan group = plan_groups(x.size(0), sample_bytes, 0);
    for_each_group(group, x.size(0), x.numel(), [&](int64_t first, int64_t count) {
      if (!sum_g.empty() || !sum_gx.empty()) {
        sum_samples(g, x_map, {}, first, count, sum_g.empty() ? nullptr : sum_g.data(),
                    sum_gx.empty() ? nullptr : sum_gx.data(), before_relu);
      } else if (relu) {
        relu_backward_samples(before_relu, first, count);
      }
      if (need_x) fuse_samples<scalar_t>(g, {.scale = pointer(scales)}, first, count, grad_x_map);
    });
    if (!sum_gx.empty()) from_acc(sum_gx.data(), grad_scale);
    if (!sum_g.empty()) from_acc(sum_g.data(), grad_shift);
  });
  return {grad_x, grad_scale, grad_shift, grad_residual};
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("channel_fuse", TORCH_BOX(&gcnet_ext::cpu::channel_fuse));
  m.impl("channel_fuse_", TORCH_BOX(&gcnet_ext::cpu::channel_fuse_));
  m.impl("channel_fuse_backward", TORCH_BOX(&gcnet_ext::cpu::channel_fuse_backward));
}
