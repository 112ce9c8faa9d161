#include "arguments.h"

#include "tensors.h"

namespace gcnet_ext {
namespace {

// w1 [H, C], b1 [H], norm [H], w2 [C, H], b2 [C]; without a w2: w1 [C, C], b1 [C]; without a w1: nothing.
void check_branch(const char* op, const char* prefix, const Branch& branch, const check::Like& x, int64_t channels) {
  const auto& [w1, b1, norm_weight, norm_bias, w2, b2] = static_cast<const PerWeight<OptionalTensor>&>(branch);
  const auto only_with = [&](bool needed, const OptionalTensor& tensor, const char* name) {
    check::require(needed || !tensor, op, {prefix, name});
  };
  only_with(w1.has_value(), b1, "b1");
  only_with(w2.has_value(), norm_weight, "norm_weight");
  only_with(w2.has_value(), norm_bias, "norm_bias");
  only_with(w1.has_value(), w2, "w2");
  only_with(w2.has_value(), b2, "b2");
  if (!w1) return;
  const int64_t hidden = !w2 ? channels : w1->dim() > 0 ? w1->size(0) : 0;
  check::require(hidden > 0, op, {prefix, "w1"});
  check::parameter(op, {prefix, "w1"}, w1, x, {hidden, channels});
  check::parameter(op, {prefix, "b1"}, b1, x, {hidden});
  check::parameter(op, {prefix, "norm_weight"}, norm_weight, x, {hidden});
  check::parameter(op, {prefix, "norm_bias"}, norm_bias, x, {hidden});
  check::parameter(op, {prefix, "w2"}, w2, x, {channels, hidden});
  check::parameter(op, {prefix, "b2"}, b2, x, {channels});
}

void check_final_activation(const char* op, int64_t number) {
  check::require(number == 0 || number == 1, op, {"", "final_activation"});
}

}  // namespace

Mask mask_of(const char* op, TensorList& list) {
  check::count(op, "mask", list.size(), 2);
  return {std::move(list[0]), std::move(list[1])};
}

Branch branch_of(const char* op, const char* name, TensorList& list) {
  check::count(op, name, list.size(), 6);
  return {
      {std::move(list[0]), std::move(list[1]), std::move(list[2]), std::move(list[3]), std::move(list[4]), std::move(list[5])}};
}

Options options_of(const char* op, std::optional<double> norm_eps, int64_t activation, double slope,
                   const std::optional<std::vector<double>>& hard_gate, int64_t final_activation) {
  check::require(activation >= 0 && activation <= static_cast<int64_t>(Activation::leaky_relu), op, {"", "activation"});
  const auto act = static_cast<Activation>(activation);
  check::count(op, "hard_gate", hard_gate ? hard_gate->size() : 2, 2);
  check_final_activation(op, final_activation);
  return {norm_eps, act, slope, hard_gate ? std::optional(HardGate{(*hard_gate)[0], (*hard_gate)[1]}) : std::nullopt,
          static_cast<FinalActivation>(final_activation)};
}

Saved saved_of(const char* op, std::vector<Tensor>& list) {
  check::count(op, "saved", list.size(), 5);
  return {std::move(list[0]), std::move(list[1]), std::move(list[2]), std::move(list[3]), std::move(list[4])};
}

Needs needs_of(const char* op, const std::vector<bool>& list) {
  check::count(op, "needs", list.size(), 6);
  return {list[0], list[1], list[2], list[3], list[4], list[5]};
}

void Arguments::check(const char* op) const {
  check::feature_map(op, x);
  check::mask(op, "mask_", mask.weight, mask.bias, x);
  check::require(scale || shift, op, {"scale_", "w1"});
  const check::Like like(x);
  check_branch(op, "scale_", scale, like, x.size(1));
  check_branch(op, "shift_", shift, like, x.size(1));
  check::residual(op, residual, x);
  check::valid(op, valid, x);
  check::parameter(op, {"", "x_scale"}, x_scale, like, {x.size(1)});
  check::parameter(op, {"", "x_shift"}, x_shift, like, {x.size(1)});
}

void BackwardArguments::check(const char* op) const {
  const Tensor& x = forward.x;
  forward.check(op);
  check::gradient(op, grad, x);
  const int64_t samples = x.size(0), channels = x.size(1);
  check::saved(op, "context", saved.context, x, {samples, channels});
  check::saved(op, "attention", saved.attention, x, {samples, forward.mask.weight ? positions(x) : 0});
  check::saved(op, "hidden", saved.hidden, x, {samples, forward.units()});
  check::saved(op, "gate_values", saved.gate_values, x, {samples, forward.scale ? channels : 0});
  check::positive(op, saved.positive, x, forward.options.has_final_relu());
}

BackwardTensors gradients_of(const BackwardArguments& call) {
  const Arguments& forward = call.forward;
  const Needs& needs = call.needs;
  const Tensor& x = forward.x;
  const auto of_branch = [&](bool needed, const Branch& branch) {
    return branch.map([&](const OptionalTensor& weight) { return gradient_of(needed, weight, x); });
  };
  return {needs.x ? empty_like_map(x) : no_gradient(x),
          gradient_of(needs.mask_weight, forward.mask.weight, x),
          gradient_of(needs.mask_bias, forward.mask.bias, x),
          of_branch(needs.scale, forward.scale),
          of_branch(needs.shift, forward.shift),
          needs.residual && forward.options.has_final_relu() ? empty_like_map(x) : no_gradient(x)};
}

void check_attention_pool(const char* op, const Tensor& x, const Mask& mask, const OptionalTensor& valid) {
  check::feature_map(op, x);
  check::mask(op, "", mask.weight, mask.bias, x);
  check::valid(op, valid, x);
}

void check_attention_pool_backward(const Tensor& grad_context, const Tensor& x, const Mask& mask, const OptionalTensor& valid,
                                   const Tensor& context, const Tensor& attention, const std::vector<bool>& needs) {
  const char* op = "attention_pool_backward";
  check_attention_pool(op, x, mask, valid);
  const int64_t samples = x.size(0), channels = x.size(1);
  check::saved(op, "grad_context", grad_context, x, {samples, channels});
  check::saved(op, "context", context, x, {samples, channels});
  check::saved(op, "attention", attention, x, {samples, mask.weight ? positions(x) : 0});
  check::count(op, "needs", needs.size(), 3);
}

void check_channel_fuse(const char* op, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                        const OptionalTensor& residual, int64_t final_activation) {
  check::feature_map(op, x, /*pooled=*/false);
  check::parameter(op, {"", "scale"}, scale, x, {x.size(0), x.size(1)});
  check::parameter(op, {"", "shift"}, shift, x, {x.size(0), x.size(1)});
  check::residual(op, residual, x);
  check_final_activation(op, final_activation);
}

void check_channel_fuse_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                 int64_t final_activation, const Tensor& positive, const std::vector<bool>& needs) {
  const char* op = "channel_fuse_backward";
  check_channel_fuse(op, x, scale, shift, /*residual=*/std::nullopt, final_activation);
  check::gradient(op, grad, x);
  check::positive(op, positive, x, final_activation != 0);
  check::count(op, "needs", needs.size(), 4);
}

void check_global_response_norm(const char* op, const Tensor& x, const Tensor& gamma, const Tensor& beta) {
  check::feature_map(op, x);
  check::require(gamma.defined(), op, {"", "gamma"});
  check::parameter(op, {"", "gamma"}, gamma, x, {x.size(1)});
  check::require(beta.defined(), op, {"", "beta"});
  check::parameter(op, {"", "beta"}, beta, x, {x.size(1)});
}

void check_global_response_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                         const Tensor& norms, const std::vector<bool>& needs) {
  const char* op = "global_response_norm_backward";
  check_global_response_norm(op, x, gamma, beta);
  check::gradient(op, grad, x);
  check::saved(op, "norms", norms, x, {x.size(0), x.size(1)});
  check::count(op, "needs", needs.size(), 3);
}

}  // namespace gcnet_ext
