// channel_fuse on the CPU: out = x*scale + shift, and its gradients.
#include "channel_fuse.h"

#include "sweep.h"

namespace gcnet_ext::cpu {
template <typename scalar_t>
void fuse_samples(const Map<const scalar_t>& x, const acc_t<scalar_t>* scale, const acc_t<scalar_t>* shift, int64_t first,
                  int64_t count, const Map<scalar_t>& out) {
  const auto fuse = map_kernels<scalar_t>().channel_fuse;
  const auto fuse_block = [&](const SweepItem& item) {
    const int64_t row = item.sample * x.layout.channels + item.c0;
    fuse(block_of(x, item), scale ? scale + row : nullptr, shift ? shift + row : nullptr, block_of(out, item));
  };
  for_each_block(sweep_plan(x), x.layout, first, count, fuse_block, Order::backwards);
}

template <typename scalar_t>
void sum_samples(const Map<const scalar_t>& a, const Map<const scalar_t>& b, int64_t first, int64_t count,
                 acc_t<scalar_t>* sum_a, acc_t<scalar_t>* sum_ab) {
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
    sums(block_of(a, item), block_of(b, item), sum_a ? part : nullptr, sum_ab ? part + channels : nullptr);
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

#define GCNET_EXT_INSTANTIATE(scalar_t)                                                                                    \
  template void fuse_samples(const Map<const scalar_t>&, const acc_t<scalar_t>*, const acc_t<scalar_t>*, int64_t, int64_t, \
                             const Map<scalar_t>&);                                                                        \
  template void sum_samples(const Map<const scalar_t>&, const Map<const scalar_t>&, int64_t, int64_t, acc_t<scalar_t>*,    \
                            acc_t<scalar_t>*);
GCNET_EXT_INSTANTIATE(double)
GCNET_EXT_INSTANTIATE(float)
GCNET_EXT_INSTANTIATE(Half)
GCNET_EXT_INSTANTIATE(BFloat16)
#undef GCNET_EXT_INSTANTIATE

namespace {

// x and out are native; out may be x.
void fuse_into(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& out) {
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    const auto scales = to_acc<acc_t<scalar_t>>(scale), shifts = to_acc<acc_t<scalar_t>>(shift);
    fuse_samples(read_map<scalar_t>(x), pointer(scales), pointer(shifts), 0, x.size(0), write_map<scalar_t>(out, x));
  });
}

std::tuple<Tensor, Tensor> channel_fuse(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                        const OptionalTensor& residual, int64_t final_activation) {
  check_channel_fuse("channel_fuse", x, scale, shift, residual, final_activation);
  const Tensor out = empty_like_map(x);
  fuse_into(native(x), scale, shift, out);
  return {out, no_bits(x)};
}

void channel_fuse_(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual,
                   int64_t final_activation) {
  check_channel_fuse("channel_fuse_", x, scale, shift, residual, final_activation);
  check::in_place("channel_fuse_", x);
  if (!scale && !shift) return;
  const Tensor map = native(x);
  fuse_into(map, scale, shift, map);
  write_back(map, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_fuse_backward(const Tensor& grad_in, const Tensor& x_in,
                                                                 const OptionalTensor& scale, const OptionalTensor& shift,
                                                                 int64_t final_activation, const Tensor& positive,
                                                                 const std::vector<bool>& needs) {
  check_channel_fuse_backward(grad_in, x_in, scale, shift, final_activation, positive, needs);
  const bool need_x = needs[0], need_scale = needs[1] && scale, need_shift = needs[2] && shift;
  const Tensor grad = native_like(grad_in, x_in), x = native(x_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_scale = gradient_of(need_scale, scale, x), grad_shift = gradient_of(need_shift, shift, x);
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto scales = to_acc<acc>(scale);
    std::vector<acc> sum_g(need_shift ? x.size(0) * x.size(1) : 0), sum_gx(need_scale ? x.size(0) * x.size(1) : 0);
    const auto g = read_map<scalar_t>(grad), x_map = read_map<scalar_t>(x);
    const auto grad_x_map = write_map_if<scalar_t>(need_x, grad_x, grad, x);
    const int64_t sample_bytes = 2 * x.size(1) * positions(x) * sizeof(scalar_t);
    const GroupPlan group = plan_groups(x.size(0), sample_bytes, 0);
    for_each_group(group, x.size(0), x.numel(), [&](int64_t first, int64_t count) {
      if (!sum_g.empty() || !sum_gx.empty()) {
        sum_samples(g, x_map, first, count, sum_g.empty() ? nullptr : sum_g.data(), sum_gx.empty() ? nullptr : sum_gx.data());
      }
      if (need_x) fuse_samples<scalar_t>(g, pointer(scales), nullptr, first, count, grad_x_map);
    });
    if (!sum_gx.empty()) from_acc(sum_gx.data(), grad_scale);
    if (!sum_g.empty()) from_acc(sum_g.data(), grad_shift);
  });
  return {grad_x, grad_scale, grad_shift, no_gradient(x)};
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("channel_fuse", TORCH_BOX(&gcnet_ext::cpu::channel_fuse));
  m.impl("channel_fuse_", TORCH_BOX(&gcnet_ext::cpu::channel_fuse_));
  m.impl("channel_fuse_backward", TORCH_BOX(&gcnet_ext::cpu::channel_fuse_backward));
}
