// global_context on CUDA: from tensors to the launches of global_context.cuh.
#include "global_context.cuh"
#include "tensors.h"

namespace gcnet_ext::cuda {

GCNET_EXT_COMPILED_HERE(launch_transform)
GCNET_EXT_COMPILED_HERE(launch_transform_backward)
GCNET_EXT_COMPILED_HERE(launch_transform_split)
GCNET_EXT_COMPILED_HERE(launch_transform_backward_split)
GCNET_EXT_COMPILED_HERE(launch_parameter_gradients)

namespace {

Branch dense(const Branch& branch) {
  return {branch.map([](const OptionalTensor& weight) { return gcnet_ext::dense(weight); })};
}
Mask dense(const Mask& mask) { return {gcnet_ext::dense(mask.weight), gcnet_ext::dense(mask.bias)}; }

// The parameters of the transform that both directions need; the weights are dense.
template <typename T>
TransformParams<T> transform_of(const Branch& scale, const Branch& shift, const Options& options, const Saved& saved) {
  using A = acc_t<T>;
  TransformParams<T> transform;
  transform.channels = saved.context.size(1);
  for (int b = 0; b < kBranches; b++) {
    const Branch& weights = b == kScale ? scale : shift;
    BranchParams<T>& branch = transform.branch[b];
    branch = {parameter<T>(weights.w1),        parameter<T>(weights.b1), parameter<T>(weights.norm_weight),
              parameter<T>(weights.norm_bias), parameter<T>(weights.w2), parameter<T>(weights.b2)};
    branch.units = weights.units();
    branch.first_unit = transform.units;
    transform.units += branch.units;
  }
  transform.norm = options.norm_eps.has_value();
  transform.eps = static_cast<A>(options.norm_eps.value_or(0));
  transform.activation = {options.activation, static_cast<A>(options.slope)};
  transform.hard_sigmoid = options.hard_gate.has_value();
  const HardGate gate = options.hard_gate.value_or(HardGate{});
  transform.gate_alpha = static_cast<A>(gate.alpha);
  transform.gate_beta = static_cast<A>(gate.beta);
  transform.hidden = acc_data<T>(saved.hidden);
  transform.gate = acc_data<T>(saved.gate_values);
  return transform;
}

// x and out are native; out may be x. The attention and the bits are computed only if the call saves them.
Saved forward_into(const Tensor& x, const Arguments& arguments, const Tensor& out, bool saves) {
  Call call(x);
  const Mask mask = dense(arguments.mask);
  const Branch scale = dense(arguments.scale), shift = dense(arguments.shift);
  const OptionalTensor valid = gcnet_ext::dense(arguments.valid);
  const OptionalTensor residual = residual_of(arguments.residual, arguments.x, /*in_place=*/out.data_ptr() == x.data_ptr());
  const bool has_relu = arguments.options.has_final_relu();
  const int64_t samples = x.size(0), channels = x.size(1);
  const ScalarType dtype = accumulation_dtype(x);
  const bool attends = mask.weight && saves;
  const Saved saved{empty(x, {samples, channels}, dtype), empty(x, {samples, attends ? positions(x) : 0}, dtype),
                    empty(x, {samples, arguments.units()}, dtype), empty(x, {samples, scale ? channels : 0}, dtype),
                    empty_bits(x, has_relu && saves)};
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    PoolParams<T> pool;
    pool.x = map_of<const T>(x);
    pool.extent = extent_of(x);
    pool.weight = parameter<T>(mask.weight);
    pool.bias = parameter<T>(mask.bias);
    pool.context = acc_data<T>(saved.context);
    if (attends) pool.attention = acc_data<T>(saved.attention);
    pool.transform = transform_of<T>(scale, shift, arguments.options, saved);
    pool.valid = valid_of<T>(valid, x);
    Fusion<T> fuse;
    fuse.out = map_of<T>(out);
    fuse.residual = map_of<const T>(residual);
    fuse.relu = has_relu;
    fuse.positive = bits_of(saved.positive);
    global_context(pool, fuse, call, call.stream());
  });
  return saved;
}

ForwardResults global_context_op(const Arguments& arguments) {
  const Tensor& x = arguments.x;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty_like_map(x);
  const Saved saved = forward_into(native(x), arguments, out, /*saves=*/true);
  return {out, saved.context, saved.attention, saved.hidden, saved.gate_values, saved.positive};
}

Tensor global_context_inference_op(const Arguments& arguments) {
  const Tensor& x = arguments.x;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty_like_map(x);
  forward_into(native(x), arguments, out, /*saves=*/false);
  return out;
}

void global_context_inplace_op(const Arguments& arguments) {
  const Tensor& x = arguments.x;
  check::in_place(kGlobalContextInPlace, x, arguments.residual);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor map = native_dense(x);
  forward_into(map, arguments, map, /*saves=*/false);
  write_back(map, x);
}

BackwardResults global_context_backward_op(const BackwardArguments& arguments) {
  const Arguments& forward = arguments.forward;
  const Tensor& x_in = forward.x;
  Call call(x_in);
  const Tensor x = native(x_in);
  const Saved saved{gcnet_ext::dense(arguments.saved.context), gcnet_ext::dense(arguments.saved.attention),
                    gcnet_ext::dense(arguments.saved.hidden), gcnet_ext::dense(arguments.saved.gate_values),
                    arguments.saved.positive};
  const Mask mask = dense(forward.mask);
  const Branch scale = dense(forward.scale), shift = dense(forward.shift);
  const OptionalTensor valid = gcnet_ext::dense(forward.valid);
  const BackwardTensors gradients = gradients_of(arguments);
  const Tensor grad = native_like(arguments.grad, x_in), positive = gcnet_ext::dense(arguments.saved.positive);
  const bool has_relu = forward.options.has_final_relu();
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    PoolBackwardParams<T> pool;
    pool.x = map_of<const T>(x);
    pool.grad = map_of<const T>(grad);
    pool.grad_x = map_if<T>(arguments.needs.x, gradients.x);
    pool.extent = extent_of(x);
    pool.weight = parameter<T>(mask.weight);
    pool.context = acc_data<T>(saved.context);
    pool.attention = acc_data<T>(saved.attention);
    pool.valid = valid_of<T>(valid, x);
    const auto of_branch = [](const PerWeight<Tensor>& branch) -> BranchGradients<T> {
      const auto& [w1, b1, norm_weight, norm_bias, w2, b2] = branch.map(mutable_parameter<T>);
      return {w1, b1, norm_weight, norm_bias, w2, b2};
    };
    const BlockGradients<T> of_block{mutable_parameter<T>(gradients.mask_weight),
                                     mutable_parameter<T>(gradients.mask_bias),
                                     {of_branch(gradients.scale), of_branch(gradients.shift)}};
    global_context_backward(pool, transform_of<T>(scale, shift, forward.options, saved), of_block,
                            has_relu ? bits_of(positive) : nullptr,
                            map_if<T>(has_relu && arguments.needs.residual, gradients.residual), call, call.stream());
  });
  return gradients.results();
}

}  // namespace
}  // namespace gcnet_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CUDA, m) {
  m.impl("global_context", TORCH_BOX((&gcnet_ext::forward<gcnet_ext::kGlobalContext, &gcnet_ext::cuda::global_context_op>)));
  m.impl("global_context_inference",
         TORCH_BOX((&gcnet_ext::forward<gcnet_ext::kGlobalContext, &gcnet_ext::cuda::global_context_inference_op>)));
  m.impl("global_context_",
         TORCH_BOX((&gcnet_ext::forward<gcnet_ext::kGlobalContextInPlace, &gcnet_ext::cuda::global_context_inplace_op>)));
  m.impl("global_context_backward", TORCH_BOX((&gcnet_ext::backward<&gcnet_ext::cuda::global_context_backward_op>)));
}
