// global_context on CUDA: from tensors to the launches of operators.h.
#include "tensors.h"

#include "instantiations.h"

namespace gcnet_ext::cuda {

#define GCNET_EXT_HERE(T) GCNET_EXT_TRANSFORM(, T)
GCNET_EXT_FOR_ALL_TYPES(GCNET_EXT_HERE)
#undef GCNET_EXT_HERE

namespace {

Branch dense(const Branch& branch) {
  return {branch.map([](const OptionalTensor& weight) { return gcnet_ext::dense(weight); })};
}
Mask dense(const Mask& mask) { return {gcnet_ext::dense(mask.weight), gcnet_ext::dense(mask.bias)}; }

// What both directions need of the branches and options; the weights are dense.
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

// x and out are native; out may be x. The attention and the bits are left out where nobody needs what is saved.
Saved forward_into(const Tensor& x, const Arguments& given, const Tensor& out, bool saves) {
  Call call(x);
  const Mask mask = dense(given.mask);
  const Branch scale = dense(given.scale), shift = dense(given.shift);
  const OptionalTensor valid = gcnet_ext::dense(given.valid);
  const OptionalTensor residual = residual_of(given.residual, given.x, /*in_place=*/out.data_ptr() == x.data_ptr());
  const bool has_relu = given.options.has_final_relu();
  const int64_t samples = x.size(0), channels = x.size(1);
  const ScalarType dtype = accumulation_dtype(x);
  const bool attends = mask.weight && saves;
  const Saved saved{empty(x, {samples, channels}, dtype), empty(x, {samples, attends ? positions(x) : 0}, dtype),
                    empty(x, {samples, given.units()}, dtype), empty(x, {samples, scale ? channels : 0}, dtype),
                    empty_bits(x, has_relu && saves)};
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    global_context<T>({map_of<const T>(x), map_of<T>(out), extent_of(x), parameter<T>(mask.weight), parameter<T>(mask.bias),
                       acc_data<T>(saved.context), attends ? acc_data<T>(saved.attention) : nullptr,
                       transform_of<T>(scale, shift, given.options, saved), map_of<const T>(residual), has_relu,
                       bits_of(saved.positive), valid_of<T>(valid, x)},
                      call, call.stream());
  });
  return saved;
}

ForwardResults global_context_op(const Arguments& given) {
  const Tensor& x = given.x;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty_like_map(x);
  const Saved saved = forward_into(native(x), given, out, /*saves=*/true);
  return {out, saved.context, saved.attention, saved.hidden, saved.gate_values, saved.positive};
}

Tensor global_context_inference_op(const Arguments& given) {
  const Tensor& x = given.x;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty_like_map(x);
  forward_into(native(x), given, out, /*saves=*/false);
  return out;
}

void global_context_inplace_op(const Arguments& given) {
  const Tensor& x = given.x;
  check::in_place(kGlobalContextInPlace, x, given.residual);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor map = native_dense(x);
  forward_into(map, given, map, /*saves=*/false);
  write_back(map, x);
}

BackwardResults global_context_backward_op(const BackwardArguments& given) {
  const Arguments& forward = given.forward;
  const Tensor& x_in = forward.x;
  Call call(x_in);
  const Tensor x = native(x_in);
  const Saved saved{gcnet_ext::dense(given.saved.context), gcnet_ext::dense(given.saved.attention),
                    gcnet_ext::dense(given.saved.hidden), gcnet_ext::dense(given.saved.gate_values), given.saved.positive};
  const Mask mask = dense(forward.mask);
  const Branch scale = dense(forward.scale), shift = dense(forward.shift);
  const OptionalTensor valid = gcnet_ext::dense(forward.valid);
  const BackwardTensors gradients = gradients_of(given);
  Tensor grad = native_like(given.grad, x_in);
  if (forward.options.has_final_relu()) {
    grad = relu_backward_of(call, grad, x, given.saved.positive, given.needs.residual, gradients.residual);
  }
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    const auto of_branch = [](const PerWeight<Tensor>& grads) -> BranchGradients<T> {
      return {mutable_parameter<T>(grads.w1),        mutable_parameter<T>(grads.b1), mutable_parameter<T>(grads.norm_weight),
              mutable_parameter<T>(grads.norm_bias), mutable_parameter<T>(grads.w2), mutable_parameter<T>(grads.b2)};
    };
    global_context_backward<T>({map_of<const T>(grad),
                                map_of<const T>(x),
                                map_if<T>(given.needs.x, gradients.x),
                                extent_of(x),
                                parameter<T>(mask.weight),
                                acc_data<T>(saved.context),
                                acc_data<T>(saved.attention),
                                transform_of<T>(scale, shift, forward.options, saved),
                                mutable_parameter<T>(gradients.mask_weight),
                                {of_branch(gradients.scale), of_branch(gradients.shift)},
                                valid_of<T>(valid, x)},
                               call, call.stream());
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
