// global_context on CUDA: from tensors to the launches of operators.h.
#include "tensors.h"

#include "instantiations.h"

namespace gcnet_ext::cuda {

#define GCNET_EXT_HERE(T) GCNET_EXT_TRANSFORM(, T)
GCNET_EXT_FOR_ALL_TYPES(GCNET_EXT_HERE)
#undef GCNET_EXT_HERE

namespace {

BranchTensors dense(const BranchTensors& tensors) {
  BranchTensors all;
  for (size_t i = 0; i < tensors.size(); i++) all[i] = cuda::dense(tensors[i]);
  return all;
}

// What both directions need of the branches and options.
template <typename T>
TransformParams<T> transform_of(const BranchTensors& scale, const BranchTensors& shift, const Tensor& x, bool norm, double eps,
                                bool silu, bool hard_sigmoid, double gate_alpha, double gate_beta, const Tensor& hidden,
                                const Tensor& gate) {
  using A = acc_t<T>;
  TransformParams<T> transform;
  transform.channels = x.size(1);
  for (int b = 0; b < kBranches; b++) {
    const BranchTensors& tensors = b == kScale ? scale : shift;
    BranchParams<T>& branch = transform.branch[b];
    const auto& [w1, b1, norm_weight, norm_bias, w2, b2] = tensors;
    branch = {parameter<T>(w1),        parameter<T>(b1), parameter<T>(norm_weight),
              parameter<T>(norm_bias), parameter<T>(w2), parameter<T>(b2)};
    branch.units = hidden_units(tensors);
    branch.first_unit = transform.units;
    transform.units += branch.units;
  }
  transform.norm = norm;
  transform.eps = static_cast<A>(eps);
  transform.silu = silu;
  transform.hard_sigmoid = hard_sigmoid;
  transform.gate_alpha = static_cast<A>(gate_alpha);
  transform.gate_beta = static_cast<A>(gate_beta);
  transform.hidden = acc_data<T>(hidden);
  transform.gate = acc_data<T>(gate);
  return transform;
}

struct Options {
  bool norm;
  double eps;
  bool silu, hard_sigmoid;
  double gate_alpha, gate_beta;
};

// What the backward pass gets of the forward pass.
struct Saved {
  Tensor context, attention, hidden, gate;
};

// x and out are native; out may be x. The attention is left out where nobody wants what is saved.
Saved forward_into(const Tensor& x, const OptionalTensor& mask_weight_in, const OptionalTensor& mask_bias_in,
                   const BranchTensors& scale_in, const BranchTensors& shift_in, const Options& options, const Tensor& out,
                   bool saves) {
  Call call(x);
  const OptionalTensor mask_weight = cuda::dense(mask_weight_in), mask_bias = cuda::dense(mask_bias_in);
  const BranchTensors scale = dense(scale_in), shift = dense(shift_in);
  const int64_t samples = x.size(0), channels = x.size(1);
  const ScalarType dtype = accumulation_dtype(x);
  const Tensor context = empty(x, {samples, channels}, dtype);
  const bool attends = mask_weight && saves;
  const Tensor attention = empty(x, {samples, attends ? positions(x) : 0}, dtype);
  const Tensor hidden = empty(x, {samples, hidden_units(scale) + hidden_units(shift)}, dtype);
  const Tensor gate = empty(x, {samples, scale[0] ? channels : 0}, dtype);
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    const auto& [norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta] = options;
    const auto transform = transform_of<T>(scale, shift, x, norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta, hidden, gate);
    global_context<T>({map_of<const T>(x), map_of<T>(out), extent_of(x), parameter<T>(mask_weight), parameter<T>(mask_bias),
                       acc_data<T>(context), attends ? acc_data<T>(attention) : nullptr, transform},
                      call, call.stream());
  });
  return {context, attention, hidden, gate};
}

void check_arguments(const char* op, const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,
                     const BranchTensors& scale, const BranchTensors& shift) {
  check::feature_map(op, x);
  check::mask(op, "mask_", mask_weight, mask_bias, x);
  check::branches(op, scale, shift, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> global_context_op(
    const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,  //
    const OptionalTensor& scale_w1, const OptionalTensor& scale_b1, const OptionalTensor& scale_norm_weight,
    const OptionalTensor& scale_norm_bias, const OptionalTensor& scale_w2, const OptionalTensor& scale_b2,
    const OptionalTensor& shift_w1, const OptionalTensor& shift_b1, const OptionalTensor& shift_norm_weight,
    const OptionalTensor& shift_norm_bias, const OptionalTensor& shift_w2, const OptionalTensor& shift_b2,  //
    bool norm, double eps, bool silu, bool hard_sigmoid, double gate_alpha, double gate_beta) {
  const BranchTensors scale{scale_w1, scale_b1, scale_norm_weight, scale_norm_bias, scale_w2, scale_b2};
  const BranchTensors shift{shift_w1, shift_b1, shift_norm_weight, shift_norm_bias, shift_w2, shift_b2};
  check_arguments("global_context", x, mask_weight, mask_bias, scale, shift);
  const Options options{norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty_like_map(x);
  const auto [context, attention, hidden, gate] =
      forward_into(native(x), mask_weight, mask_bias, scale, shift, options, out, true);
  return {out, context, attention, hidden, gate};
}

Tensor global_context_inference_op(const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,  //
                                   const OptionalTensor& scale_w1, const OptionalTensor& scale_b1,
                                   const OptionalTensor& scale_norm_weight, const OptionalTensor& scale_norm_bias,
                                   const OptionalTensor& scale_w2, const OptionalTensor& scale_b2,
                                   const OptionalTensor& shift_w1, const OptionalTensor& shift_b1,
                                   const OptionalTensor& shift_norm_weight, const OptionalTensor& shift_norm_bias,
                                   const OptionalTensor& shift_w2, const OptionalTensor& shift_b2,  //
                                   bool norm, double eps, bool silu, bool hard_sigmoid, double gate_alpha, double gate_beta) {
  const BranchTensors scale{scale_w1, scale_b1, scale_norm_weight, scale_norm_bias, scale_w2, scale_b2};
  const BranchTensors shift{shift_w1, shift_b1, shift_norm_weight, shift_norm_bias, shift_w2, shift_b2};
  check_arguments("global_context", x, mask_weight, mask_bias, scale, shift);
  const Options options{norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty_like_map(x);
  forward_into(native(x), mask_weight, mask_bias, scale, shift, options, out, false);
  return out;
}

void global_context_inplace_op(const Tensor& x, const OptionalTensor& mask_weight, const OptionalTensor& mask_bias,  //
                               const OptionalTensor& scale_w1, const OptionalTensor& scale_b1,
                               const OptionalTensor& scale_norm_weight, const OptionalTensor& scale_norm_bias,
                               const OptionalTensor& scale_w2, const OptionalTensor& scale_b2, const OptionalTensor& shift_w1,
                               const OptionalTensor& shift_b1, const OptionalTensor& shift_norm_weight,
                               const OptionalTensor& shift_norm_bias, const OptionalTensor& shift_w2,
                               const OptionalTensor& shift_b2,  //
                               bool norm, double eps, bool silu, bool hard_sigmoid, double gate_alpha, double gate_beta) {
  const BranchTensors scale{scale_w1, scale_b1, scale_norm_weight, scale_norm_bias, scale_w2, scale_b2};
  const BranchTensors shift{shift_w1, shift_b1, shift_norm_weight, shift_norm_bias, shift_w2, shift_b2};
  check_arguments("global_context_", x, mask_weight, mask_bias, scale, shift);
  check::in_place("global_context_", x);
  const Options options{norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor map = native_dense(x);
  forward_into(map, mask_weight, mask_bias, scale, shift, options, map, false);
  write_back(map, x);
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients global_context_backward_op(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& mask_weight_in,  //
                                     const OptionalTensor& scale_w1, const OptionalTensor& scale_b1,
                                     const OptionalTensor& scale_norm_weight, const OptionalTensor& scale_norm_bias,
                                     const OptionalTensor& scale_w2, const OptionalTensor& scale_b2,
                                     const OptionalTensor& shift_w1, const OptionalTensor& shift_b1,
                                     const OptionalTensor& shift_norm_weight, const OptionalTensor& shift_norm_bias,
                                     const OptionalTensor& shift_w2, const OptionalTensor& shift_b2,  //
                                     bool norm, double eps, bool silu, bool hard_sigmoid, double gate_alpha, double gate_beta,
                                     const Tensor& context_in, const Tensor& attention_in, const Tensor& hidden_in,
                                     const Tensor& gate_in,  //
                                     bool need_x, bool need_mask, bool need_scale, bool need_shift) {
  const char* op = "global_context_backward";
  const BranchTensors scale_in{scale_w1, scale_b1, scale_norm_weight, scale_norm_bias, scale_w2, scale_b2};
  const BranchTensors shift_in{shift_w1, shift_b1, shift_norm_weight, shift_norm_bias, shift_w2, shift_b2};
  check_arguments(op, x_in, mask_weight_in, std::nullopt, scale_in, shift_in);
  check::gradient(op, grad_in, x_in);
  const int64_t samples = x_in.size(0), channels = x_in.size(1);
  check::side(op, "context", context_in, x_in, {samples, channels});
  check::side(op, "attention", attention_in, x_in, {samples, mask_weight_in ? positions(x_in) : 0});
  check::side(op, "hidden", hidden_in, x_in, {samples, hidden_units(scale_in) + hidden_units(shift_in)});
  check::side(op, "gate_values", gate_in, x_in, {samples, scale_w1 ? channels : 0});

  Call call(x_in);
  const Tensor grad = native_like(grad_in, x_in), x = native(x_in);
  const Tensor context = cuda::dense(context_in), attention = cuda::dense(attention_in);
  const Tensor hidden = cuda::dense(hidden_in), gate = cuda::dense(gate_in);
  const OptionalTensor mask_weight = cuda::dense(mask_weight_in);
  const BranchTensors scale = dense(scale_in), shift = dense(shift_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_mask = gradient_of(need_mask, mask_weight, x_in);
  std::array<Tensor, 6> grad_scale, grad_shift;
  for (size_t i = 0; i < grad_scale.size(); i++) {
    grad_scale[i] = gradient_of(need_scale, scale[i], x_in);
    grad_shift[i] = gradient_of(need_shift, shift[i], x_in);
  }
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    const auto gradients_of = [](const std::array<Tensor, 6>& grads) -> BranchGradients<T> {
      const auto at = [&](size_t i) { return mutable_parameter<T>(grads[i]); };
      return {at(0), at(1), at(2), at(3), at(4), at(5)};
    };
    const auto transform = transform_of<T>(scale, shift, x, norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta, hidden, gate);
    global_context_backward<T>({map_of<const T>(grad),
                                map_of<const T>(x),
                                map_if<T>(need_x, grad_x),
                                extent_of(x),
                                parameter<T>(mask_weight),
                                acc_data<T>(context),
                                acc_data<T>(attention),
                                transform,
                                mutable_parameter<T>(grad_mask),
                                {gradients_of(grad_scale), gradients_of(grad_shift)}},
                               call, call.stream());
  });
  return {grad_x,        grad_mask,     grad_scale[0], grad_scale[1], grad_scale[2], grad_scale[3], grad_scale[4],
          grad_scale[5], grad_shift[0], grad_shift[1], grad_shift[2], grad_shift[3], grad_shift[4], grad_shift[5]};
}

}  // namespace
}  // namespace gcnet_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CUDA, m) {
  m.impl("global_context", TORCH_BOX(&gcnet_ext::cuda::global_context_op));
  m.impl("global_context_inference", TORCH_BOX(&gcnet_ext::cuda::global_context_inference_op));
  m.impl("global_context_", TORCH_BOX(&gcnet_ext::cuda::global_context_inplace_op));
  m.impl("global_context_backward", TORCH_BOX(&gcnet_ext::cuda::global_context_backward_op));
}
