// channel_fuse on the CPU: out = x*scale + shift, and its gradients.
#include "channel_fuse.h"

#include <memory>

#include "parallel.h"

namespace gcnet_ext::cpu {
namespace {

struct SweepItem {
  int64_t sample, c0, channels, p0, positions, position_block;
};

// The i-th block of a sweep over samples first, first + 1, ...; the blocks of a sample follow one another.
SweepItem sweep_item(const SweepPlan& plan, const Layout& layout, int64_t first, int64_t i) {
  const int64_t channel_block = i % plan.channel_blocks, rest = i / plan.channel_blocks;
  const int64_t position_block = rest % plan.position_blocks;
  const int64_t c0 = channel_block * plan.channels, p0 = position_block * plan.positions;
  return {first + rest / plan.position_blocks,
          c0,
          std::min(plan.channels, layout.channels - c0),
          p0,
          std::min(plan.positions, layout.positions - p0),
          position_block};
}

}  // namespace

template <typename scalar_t>
void fuse_samples(const Map<const scalar_t>& x, const acc_t<scalar_t>* scale, const acc_t<scalar_t>* shift, int64_t first,
                  int64_t count, const Map<scalar_t>& out) {
  const Layout& layout = x.layout;
  const SweepPlan plan = plan_cpu_sweep(layout.channels, layout.positions, sizeof(scalar_t), layout.channels_last);
  const auto fuse = map_kernels<scalar_t>().channel_fuse;
  const int64_t items = count * plan.channel_blocks * plan.position_blocks;
  const auto fuse_item = [&](int64_t i) {
    const SweepItem item = sweep_item(plan, layout, first, i);
    const int64_t row = item.sample * layout.channels + item.c0;
    fuse(x.block(item.sample, item.c0, item.channels, item.p0, item.positions), scale ? scale + row : nullptr,
         shift ? shift + row : nullptr, out.block(item.sample, item.c0, item.channels, item.p0, item.positions));
  };
  parallel_for(items, count * layout.channels * layout.positions, fuse_item, Order::backwards);
}

template <typename scalar_t>
void sum_samples(const Map<const scalar_t>& a, const Map<const scalar_t>& b, int64_t first, int64_t count,
                 acc_t<scalar_t>* sum_a, acc_t<scalar_t>* sum_ab) {
  using acc = acc_t<scalar_t>;
  const Layout& layout = a.layout;
  const int64_t channels = layout.channels;
  const SweepPlan plan = plan_cpu_sweep(channels, layout.positions, sizeof(scalar_t), layout.channels_last);
  const auto sums = map_kernels<scalar_t>().channel_sums;
  const int64_t blocks = plan.position_blocks, items = count * plan.channel_blocks * blocks;
  // One partial sum per block of positions, then added in their order.
  const std::unique_ptr<acc[]> partial(new acc[2 * count * blocks * channels]);
  parallel_for(items, count * channels * layout.positions, [&](int64_t i) {
    const SweepItem item = sweep_item(plan, layout, first, i);
    acc* part = partial.get() + 2 * ((item.sample - first) * blocks + item.position_block) * channels + item.c0;
    std::fill_n(part, item.channels, acc(0));
    std::fill_n(part + channels, item.channels, acc(0));
    sums(a.block(item.sample, item.c0, item.channels, item.p0, item.positions),
         b.block(item.sample, item.c0, item.channels, item.p0, item.positions), sum_a ? part : nullptr,
         sum_ab ? part + channels : nullptr);
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

Tensor channel_fuse(const Tensor& x_in, const OptionalTensor& scale, const OptionalTensor& shift) {
  check::feature_map("channel_fuse", x_in, /*pooled=*/false);
  check::parameter("channel_fuse", "scale", scale, x_in, {x_in.size(0), x_in.size(1)});
  check::parameter("channel_fuse", "shift", shift, x_in, {x_in.size(0), x_in.size(1)});
  const Tensor x = native(x_in), out = empty_like_map(x_in);
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    const auto scales = to_acc<acc_t<scalar_t>>(scale), shifts = to_acc<acc_t<scalar_t>>(shift);
    fuse_samples(read_map<scalar_t>(x), pointer(scales), pointer(shifts), 0, x.size(0), write_map<scalar_t>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> channel_fuse_backward(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& scale,
                                                         const OptionalTensor& shift, bool need_x, bool need_scale,
                                                         bool need_shift) {
  const char* op = "channel_fuse_backward";
  check::feature_map(op, x_in, /*pooled=*/false);
  check::gradient(op, grad_in, x_in);
  check::parameter(op, "scale", scale, x_in, {x_in.size(0), x_in.size(1)});
  check::parameter(op, "shift", shift, x_in, {x_in.size(0), x_in.size(1)});
  const Tensor grad = native_like(grad_in, x_in), x = native(x_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_scale = gradient_of(need_scale, scale, x), grad_shift = gradient_of(need_shift, shift, x);
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto scales = to_acc<acc>(scale);
    std::vector<acc> sum_g(need_shift && shift ? x.size(0) * x.size(1) : 0),
        sum_gx(need_scale && scale ? x.size(0) * x.size(1) : 0);
    const auto g = read_map<scalar_t>(grad);
    const int64_t sample_bytes = 2 * x.size(1) * positions(x) * sizeof(scalar_t);
    const GroupPlan group = plan_cpu_group(x.size(0), sample_bytes, 0, torch_threads());
    for_each_group(group, x.size(0), x.numel(), [&](int64_t first, int64_t count) {
      if (!sum_g.empty() || !sum_gx.empty()) {
        sum_samples(g, read_map<scalar_t>(x), first, count, sum_g.empty() ? nullptr : sum_g.data(),
                    sum_gx.empty() ? nullptr : sum_gx.data());
      }
      if (need_x) fuse_samples<scalar_t>(g, pointer(scales), nullptr, first, count, write_map<scalar_t>(grad_x));
    });
    if (!sum_gx.empty()) from_acc(sum_gx.data(), grad_scale);
    if (!sum_g.empty()) from_acc(sum_g.data(), grad_shift);
  });
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("channel_fuse", TORCH_BOX(&gcnet_ext::cpu::channel_fuse));
  m.impl("channel_fuse_backward", TORCH_BOX(&gcnet_ext::cpu::channel_fuse_backward));
}
