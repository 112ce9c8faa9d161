// attention_pool on CUDA: from tensors to launches.
#include "attention_pool_backward.cuh"
#include "tensors.h"

namespace gcnet_ext::cuda {

GCNET_EXT_COMPILED_HERE(launch_attention_pool)
GCNET_EXT_COMPILED_HERE(launch_attention_pool_backward)

namespace {

std::tuple<Tensor, Tensor> attention_pool_op(const Tensor& x_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in,
                                             const OptionalTensor& valid_in) {
  check_attention_pool("attention_pool", x_in, {weight_in, bias_in}, valid_in);
  Call call(x_in);
  const Tensor x = native(x_in);
  const OptionalTensor weight = dense(weight_in), bias = dense(bias_in), valid = dense(valid_in);
  const Tensor context = empty(x, {x.size(0), x.size(1)}, accumulation_dtype(x));
  const Tensor attention = empty(x, {x.size(0), weight ? positions(x) : 0}, accumulation_dtype(x));
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    PoolParams<T> params;
    params.x = map_of<const T>(x);
    params.extent = extent_of(x);
    params.weight = parameter<T>(weight);
    params.bias = parameter<T>(bias);
    params.context = acc_data<T>(context);
    params.attention = acc_data<T>(attention);
    params.valid = valid_of<T>(valid, x);
    attention_pool(params, call, call.stream());
  });
  return {context, attention};
}

std::tuple<Tensor, Tensor, Tensor> attention_pool_backward_op(const Tensor& grad_context_in, const Tensor& x_in,
                                                              const OptionalTensor& weight_in, const OptionalTensor& bias,
                                                              const OptionalTensor& valid_in, const Tensor& context_in,
                                                              const Tensor& attention_in, const std::vector<bool>& needs) {
  check_attention_pool_backward(grad_context_in, x_in, {weight_in, bias}, valid_in, context_in, attention_in, needs);
  const bool need_x = needs[0], need_weight = needs[1];
  Call call(x_in);
  const Tensor x = weight_in ? native(x_in) : x_in;  // the backward pass of average pooling does not read x
  const OptionalTensor weight = dense(weight_in), valid = dense(valid_in);
  const Tensor grad_context = dense(grad_context_in), context = dense(context_in), attention = dense(attention_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_weight = gradient_of(need_weight, weight, x_in), grad_bias = gradient_of(needs[2], bias, x_in);
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    PoolBackwardParams<T> params;
    params.x = map_of<const T>(x);
    params.grad_x = map_if<T>(need_x, grad_x);
    params.extent = extent_of(x);
    params.weight = parameter<T>(weight);
    params.grad_context = acc_data<T>(grad_context);
    params.context = acc_data<T>(context);
    params.attention = acc_data<T>(attention);
    params.valid = valid_of<T>(valid, x);
    GradientParams<T> gradients;
    gradients.add_zero(mutable_parameter<T>(grad_bias));
    attention_pool_backward(params, mutable_parameter<T>(grad_weight), gradients, call, call.stream());
    launch_parameter_gradients(gradients, /*early=*/false, call.stream());
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace gcnet_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CUDA, m) {
  m.impl("attention_pool", TORCH_BOX(&gcnet_ext::cuda::attention_pool_op));
  m.impl("attention_pool_backward", TORCH_BOX(&gcnet_ext::cuda::attention_pool_backward_op));
}
