// attention_pool on the CPU, and its gradients.
#include "attention_pool.h"

namespace gcnet_ext::cpu {
namespace {

std::tuple<Tensor, Tensor> attention_pool_op(const Tensor& x_in, const OptionalTensor& weight, const OptionalTensor& bias,
                                             const OptionalTensor& valid_in) {
  check_attention_pool("attention_pool", x_in, {weight, bias}, valid_in);
  const Tensor x = native(x_in);
  const Tensor context = empty(x, {x.size(0), x.size(1)}, accumulation_dtype(x));
  const Tensor attention = empty(x, {x.size(0), weight ? positions(x) : 0}, accumulation_dtype(x));
  const OptionalTensor valid = dense(valid_in);
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto w = to_acc<acc>(weight), b = to_acc<acc>(bias);
    const auto map = read_map<scalar_t>(x);
    const PoolMask<acc> mask{pointer(w), b.empty() ? acc(0) : b[0]};
    const Valid counted(valid, positions(x));
    const auto contexts = matrix_of<acc>(context), attentions = matrix_of<acc>(attention);
    for_each_group(map.layout, sizeof(scalar_t), /*weight_bytes=*/0, [&](int64_t first, int64_t count) {
      pool_samples(map.samples(first, count), mask, counted.samples(first), contexts.row_range(first, count),
                   attentions.row_range(first, count));
    });
  });
  return {context, attention};
}

std::tuple<Tensor, Tensor, Tensor> attention_pool_backward_op(const Tensor& grad_context_in, const Tensor& x_in,
                                                              const OptionalTensor& weight, const OptionalTensor& bias,
                                                              const OptionalTensor& valid_in, const Tensor& context_in,
                                                              const Tensor& attention_in, const std::vector<bool>& needs) {
  check_attention_pool_backward(grad_context_in, x_in, {weight, bias}, valid_in, context_in, attention_in, needs);
  const bool need_x = needs[0], need_weight = needs[1];
  const Tensor grad_context = dense(grad_context_in), context = dense(context_in), attention = dense(attention_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_weight = gradient_of(need_weight, weight, x_in), grad_bias = gradient_of(needs[2], bias, x_in);
  write_zero_gradient(grad_bias);
  if (!need_x && !(need_weight && weight)) return {grad_x, grad_weight, grad_bias};
  const OptionalTensor valid = dense(valid_in);
  const Tensor x = weight ? native(x_in) : grad_x;  // average pooling reads no element of x
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const Valid counted(valid, positions(x));
    const auto grad_contexts = matrix_of<const acc>(grad_context);
    if (!weight) return average_pool_backward<scalar_t>(grad_contexts, counted, write_map<scalar_t>(grad_x));
    const auto w = to_acc<acc>(weight);
    const auto map = read_map<scalar_t>(x);
    const PoolPlan plan = pool_plan(map);
    const auto parts = grad_weight_parts<acc>(plan, map.layout, need_weight);
    const PoolBackwardInputs<acc> inputs{.grad_context = grad_contexts,
                                         .context = matrix_of<const acc>(context),
                                         .attention = matrix_of<const acc>(attention),
                                         .weight = w.data(),
                                         .scale = {},
                                         .valid = counted};
    const auto grad_x_map = write_map_if<scalar_t>(need_x, grad_x, x);
    for_each_group(map.layout, sizeof(scalar_t), /*weight_bytes=*/0, [&](int64_t first, int64_t count) {
      pool_backward_samples<scalar_t>({}, map.samples(first, count), inputs.samples(first, count),
                                      grad_x_map.samples(first, count),
                                      parts.row_range(first * plan.splits, count * plan.splits));
    });
    if (need_weight) sum_grad_weight_parts<acc>(parts, grad_weight);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("attention_pool", TORCH_BOX(&gcnet_ext::cpu::attention_pool_op));
  m.impl("attention_pool_backward", TORCH_BOX(&gcnet_ext::cpu::attention_pool_backward_op));
}
