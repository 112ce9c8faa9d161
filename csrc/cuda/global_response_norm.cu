// global_response_norm on CUDA: from tensors to launches.
#include "global_response_norm.cuh"

#include "channel_fuse.cuh"
#include "channel_sums.cuh"
#include "tensors.h"

namespace gcnet_ext::cuda {

GCNET_EXT_COMPILED_HERE(launch_response_factors)
GCNET_EXT_COMPILED_HERE(launch_response_gradient_factors)
GCNET_EXT_COMPILED_HERE(launch_response_gradient)

namespace {

template <typename T>
ResponseParams<T> params_of(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, const Tensor& norms) {
  ResponseParams<T> params;
  params.extent = extent_of(x);
  params.eps = static_cast<acc_t<T>>(eps);
  params.gamma = parameter<T>(gamma);
  params.beta = parameter<T>(beta);
  params.norms = acc_data<T>(norms);
  return params;
}

std::tuple<Tensor, Tensor> global_response_norm_op(const Tensor& x_in, const Tensor& gamma, const Tensor& beta, double eps) {
  check_global_response_norm("global_response_norm", x_in, gamma, beta);
  Call call(x_in);
  const Tensor x = native(x_in), out = empty_like_map(x_in);
  const Tensor norms = empty(x, {x.size(0), x.size(1)}, accumulation_dtype(x));
  const Tensor dense_gamma = dense(gamma), dense_beta = dense(beta);
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using A = acc_t<T>;
    SumsParams<T> squares;
    squares.a = squares.b = map_of<const T>(x);
    squares.extent = extent_of(x);
    squares.sum_ab = MutableParameter<T>(acc_data<T>(norms));
    launch_channel_sums(squares, call, call.stream());
    ResponseParams<T> params = params_of<T>(x, dense_gamma, dense_beta, eps, norms);
    params.scale = call.take<A>(norms.numel());
    params.shift = call.take<A>(norms.numel());
    launch_response_factors(params, call.stream());
    channel_fuse<T>(
        {{map_of<const T>(x), map_of<T>(out), extent_of(x), Parameter<T>(params.scale), Parameter<T>(params.shift)}},
        call.stream());
  });
  return {out, norms};
}

std::tuple<Tensor, Tensor, Tensor> global_response_norm_backward_op(const Tensor& grad_in, const Tensor& x_in,
                                                                    const Tensor& gamma, const Tensor& beta, double eps,
                                                                    const Tensor& norms_in, const std::vector<bool>& needs) {
  check_global_response_norm_backward(grad_in, x_in, gamma, beta, norms_in, needs);
  Call call(x_in);
  const Tensor grad = native_like(grad_in, x_in), x = native(x_in), norms = dense(norms_in);
  const Tensor dense_gamma = dense(gamma), dense_beta = dense(beta);
  const bool need_x = needs[0], need_gamma = needs[1], need_beta = needs[2];
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_gamma = gradient_of(need_gamma, gamma, x), grad_beta = gradient_of(need_beta, beta, x);
  if (!need_x && !need_gamma && !need_beta) return {grad_x, grad_gamma, grad_beta};
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    using A = acc_t<T>;
    ResponseParams<T> params = params_of<T>(x, dense_gamma, dense_beta, eps, norms);
    params.grad_gamma = mutable_parameter<T>(grad_gamma);
    params.grad_beta = mutable_parameter<T>(grad_beta);
    SumsParams<T> sums;
    sums.a = map_of<const T>(grad);
    sums.extent = extent_of(x);
    if (need_x || need_gamma) {
      params.products = call.take<A>(norms.numel());
      sums.b = map_of<const T>(x);
      sums.sum_ab = MutableParameter<T>(params.products);
    }
    if (need_beta) {
      A* const sum_g = call.take<A>(norms.numel());
      params.sum_g = sum_g;
      sums.sum_a = MutableParameter<T>(sum_g);
    }
    launch_channel_sums(sums, call, call.stream());
    if (need_x) {
      params.scale = call.take<A>(norms.numel());
      params.factor = call.take<A>(norms.numel());
    }
    launch_response_gradient_factors(params, call.stream());
    if (need_x) {
      launch_response_gradient<T>(map_of<const T>(grad), map_of<const T>(x), map_of<T>(grad_x), extent_of(x), params.scale,
                                  params.factor, call.stream());
    }
  });
  return {grad_x, grad_gamma, grad_beta};
}

}  // namespace
}  // namespace gcnet_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CUDA, m) {
  m.impl("global_response_norm", TORCH_BOX(&gcnet_ext::cuda::global_response_norm_op));
  m.impl("global_response_norm_backward", TORCH_BOX(&gcnet_ext::cuda::global_response_norm_backward_op));
}
