// channel_fuse on the CPU: out = relu(x*scale + shift + residual), and its gradients.
#include "channel_fuse.h"

namespace gcnet_ext::cpu {
namespace {

// A parameter [N, C] as numbers of acc; absent where there is none.
template <typename acc>
Matrix<const acc> matrix_of(const std::vector<acc>& values, const Tensor& x) {
  return values.empty() ? Matrix<const acc>{} : Matrix<const acc>{values.data(), x.size(0), x.size(1), x.size(1)};
}

// x and out are native; out may be x. The bits of a ReLU are written to `positive` if it has room for them.
void fuse_into(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& residual_in,
               bool relu, const Tensor& out, const Tensor& positive) {
  const OptionalTensor residual = residual_of(residual_in, x, /*in_place=*/out.data_ptr() == x.data_ptr());
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    const auto scales = to_acc<acc_t<scalar_t>>(scale), shifts = to_acc<acc_t<scalar_t>>(shift);
    const auto map = read_map<scalar_t>(x);
    const MapFusion<scalar_t> fusion{matrix_of(scales, x), matrix_of(shifts, x), read_map<scalar_t>(residual), relu,
                                     bits_of<uint8_t>(positive, map.layout)};
    fuse_samples(map, fusion, write_map<scalar_t>(out, x));
  });
}

std::tuple<Tensor, Tensor> channel_fuse_op(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                           const OptionalTensor& residual, int64_t final_activation) {
  check_channel_fuse("channel_fuse", x, scale, shift, residual, final_activation);
  const bool relu = final_activation != 0;
  const Tensor out = empty_like_map(x), positive = empty_bits(x, relu);
  fuse_into(native(x), scale, shift, residual, relu, out, positive);
  return {out, positive};
}

void channel_fuse_inplace_op(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                             const OptionalTensor& residual, int64_t final_activation) {
  check_channel_fuse("channel_fuse_", x, scale, shift, residual, final_activation);
  check::in_place("channel_fuse_", x, residual);
  if (!scale && !shift && !residual && final_activation == 0) return;
  const Tensor map = native(x);
  fuse_into(map, scale, shift, residual, final_activation != 0, map, empty_bits(x, false));
  write_back(map, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_fuse_backward_op(const Tensor& grad_in, const Tensor& x_in,
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
    const MatrixBuffer<acc> sum_g(x.size(0), x.size(1), need_shift), sum_gx(x.size(0), x.size(1), need_scale);
    const auto g_map = read_map<scalar_t>(through), x_map = read_map<scalar_t>(x);
    const auto before_relu = relu ? ReluBackward<scalar_t>(grad, positive, through) : ReluBackward<scalar_t>();
    const MapFusion<scalar_t> by_scale{.scale = matrix_of(scales, x)};
    const auto grad_x_map = write_map_if<scalar_t>(need_x, grad_x, through, x);
    for_each_group(x_map.layout, 2 * sizeof(scalar_t), /*weight_bytes=*/0, [&](int64_t first, int64_t count) {
      const auto g = g_map.samples(first, count);
      if (need_shift || need_scale) {
        sum_samples(g, x_map.samples(first, count), {}, sum_g.row_range(first, count), sum_gx.row_range(first, count),
                    before_relu.samples(first, count));
      } else if (relu) {
        relu_backward_samples(before_relu.samples(first, count));
      }
      if (need_x) fuse_samples(g, by_scale.samples(first, count), grad_x_map.samples(first, count));
    });
    if (need_scale) from_acc(sum_gx.data, grad_scale);
    if (need_shift) from_acc(sum_g.data, grad_shift);
  });
  return {grad_x, grad_scale, grad_shift, grad_residual};
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("channel_fuse", TORCH_BOX(&gcnet_ext::cpu::channel_fuse_op));
  m.impl("channel_fuse_", TORCH_BOX(&gcnet_ext::cpu::channel_fuse_inplace_op));
  m.impl("channel_fuse_backward", TORCH_BOX(&gcnet_ext::cpu::channel_fuse_backward_op));
}
