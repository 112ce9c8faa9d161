// channel_fuse on CUDA: from tensors to launches.
#include "channel_fuse.cuh"
#include "channel_sums.cuh"
#include "tensors.h"

namespace gcnet_ext::cuda {

GCNET_EXT_COMPILED_HERE(launch_channel_fuse)
GCNET_EXT_COMPILED_HERE(launch_fuse_elements)
GCNET_EXT_COMPILED_HERE(launch_fuse_items)
GCNET_EXT_COMPILED_HERE(launch_positive_bits)
GCNET_EXT_COMPILED_HERE(launch_relu_backward)
GCNET_EXT_COMPILED_HERE(with_shares)
GCNET_EXT_COMPILED_HERE(launch_average_valid)
GCNET_EXT_COMPILED_HERE(launch_channel_sums)

namespace {

// to = from, bit for bit. No kernel does this, because not even x*1 keeps the bits of a NaN.
void copy(const Tensor& from, Tensor to) { torch::stable::copy_(to, from); }

// x, residual and out are native; out may be x. An empty `positive` gets no bits.
void fuse_into(const Tensor& x, const OptionalTensor& scale_in, const OptionalTensor& shift_in, const OptionalTensor& residual,
               int64_t final_activation, const Tensor& out, const Tensor& positive) {
  Call call(x);
  const OptionalTensor scale = dense(scale_in), shift = dense(shift_in);
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Fusion<T> fusion{{map_of<const T>(x), map_of<T>(out), extent_of(x), parameter<T>(scale), parameter<T>(shift)}};
    fusion.residual = map_of<const T>(residual);
    fusion.relu = final_activation != 0;
    fusion.positive = bits_of(positive);
    channel_fuse(fusion, call.stream());
  });
}

std::tuple<Tensor, Tensor> channel_fuse_op(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                           const OptionalTensor& residual, int64_t final_activation) {
  check_channel_fuse("channel_fuse", x, scale, shift, residual, final_activation);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty_like_map(x), positive = empty_bits(x, final_activation != 0);
  if (scale || shift || residual || final_activation != 0) {
    const OptionalTensor added = residual_of(residual, x, /*in_place=*/false);
    fuse_into(native(x), scale, shift, added, final_activation, out, positive);
  } else {
    copy(x, out);
  }
  return {out, positive};
}

void channel_fuse_inplace_op(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                             const OptionalTensor& residual, int64_t final_activation) {
  check_channel_fuse("channel_fuse_", x, scale, shift, residual, final_activation);
  check::in_place("channel_fuse_", x, residual);
  if (!scale && !shift && !residual && final_activation == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor map = native_dense(x);
  const OptionalTensor added = residual_of(residual, x, /*in_place=*/true);
  fuse_into(map, scale, shift, added, final_activation, map, empty_bits(x, /*has_relu=*/false));
  write_back(map, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_fuse_backward_op(const Tensor& grad_in, const Tensor& x_in,
                                                                    const OptionalTensor& scale_in, const OptionalTensor& shift,
                                                                    int64_t final_activation, const Tensor& positive,
                                                                    const std::vector<bool>& needs) {
  check_channel_fuse_backward(grad_in, x_in, scale_in, shift, final_activation, positive, needs);
  const bool need_x = needs[0], need_scale = needs[1], need_shift = needs[2];
  Call call(x_in);
  const Tensor x = native(x_in);
  const bool has_relu = final_activation != 0, need_residual = needs[3] && has_relu;
  const Tensor grad_residual = need_residual ? empty_like_map(x_in) : no_gradient(x);
  Tensor grad = native_like(grad_in, x_in);
  if (has_relu) grad = relu_backward_of(call, grad, x, positive, need_residual, grad_residual);
  const OptionalTensor scale = dense(scale_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_scale = gradient_of(need_scale, scale, x), grad_shift = gradient_of(need_shift, shift, x);
  const bool sums = grad_scale.numel() > 0 || grad_shift.numel() > 0;
  if (!sums && !scale && need_x) copy(grad, grad_x);
  if (!sums && !(scale && need_x)) return {grad_x, grad_scale, grad_shift, grad_residual};
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    if (!sums) {
      return channel_fuse<T>({{map_of<const T>(grad), map_of<T>(grad_x), extent_of(x), parameter<T>(scale)}}, call.stream());
    }
    SumsParams<T> params;
    params.a = map_of<const T>(grad);
    params.b = map_if<const T>(grad_scale.numel() > 0, x);
    params.fused = map_if<T>(need_x, grad_x);
    params.scale = parameter<T>(scale);
    params.extent = extent_of(x);
    params.sum_a = mutable_parameter<T>(grad_shift);
    params.sum_ab = mutable_parameter<T>(grad_scale);
    launch_channel_sums(params, call, call.stream());
  });
  return {grad_x, grad_scale, grad_shift, grad_residual};
}

}  // namespace
}  // namespace gcnet_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CUDA, m) {
  m.impl("channel_fuse", TORCH_BOX(&gcnet_ext::cuda::channel_fuse_op));
  m.impl("channel_fuse_", TORCH_BOX(&gcnet_ext::cuda::channel_fuse_inplace_op));
  m.impl("channel_fuse_backward", TORCH_BOX(&gcnet_ext::cuda::channel_fuse_backward_op));
}
