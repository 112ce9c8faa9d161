// The arguments of the operators, for both devices: the lists of csrc/ops.cpp are unpacked and checked here and nowhere else.
#pragma once

#include "activation.h"
#include "check.h"
#include "stable.h"

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace gcnet_ext {

using TensorList = std::vector<OptionalTensor>;
// The results of global_context and of global_context_backward, in the order of their schemas in csrc/ops.cpp.
using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResults = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor>;

// The 1x1 convolution of the attention pool; without a weight the pool averages.
struct Mask {
  OptionalTensor weight, bias;
};

// One T for each weight of a branch.
template <typename T>
struct PerWeight {
  T w1, b1, norm_weight, norm_bias, w2, b2;

  // Returns f(weight) for each weight.
  template <typename F>
  auto map(const F& f) const -> PerWeight<decltype(f(w1))> {
    return {f(w1), f(b1), f(norm_weight), f(norm_bias), f(w2), f(b2)};
  }
  std::vector<T> list() const { return {w1, b1, norm_weight, norm_bias, w2, b2}; }
};

// The weights of one branch of the transform, t = w2 act(norm(w1 ctx + b1)) + b2; without a w1 there is none.
struct Branch : PerWeight<OptionalTensor> {
  explicit operator bool() const { return w1.has_value(); }
  int64_t units() const { return w1 ? w1->size(0) : 0; }
};

// The gate clip(alpha t + beta, 0, 1).
struct HardGate {
  double alpha, beta;
};

struct Options {
  std::optional<double> norm_eps;
  Activation activation;
  double slope;
  std::optional<HardGate> hard_gate;
  FinalActivation final_activation;

  bool has_final_relu() const { return final_activation == FinalActivation::relu; }
};

// The arguments of the forward operators.
struct Arguments {
  Tensor x;
  Mask mask;
  Branch scale, shift;
  OptionalTensor residual, valid;
  Options options;
  OptionalTensor x_scale{}, x_shift{};  // of normed_global_context_inference and normed_global_context_ alone

  int64_t units() const { return scale.units() + shift.units(); }
  void check(const char* op) const;
};

// What the forward pass keeps for the backward pass.
struct Saved {
  Tensor context, attention, hidden, gate_values, positive;
};

// Which gradients are needed.
struct Needs {
  bool x, mask_weight, mask_bias, scale, shift, residual;
};

struct BackwardArguments {
  Tensor grad;
  Arguments forward;  // without the residual, on which no gradient depends
  Saved saved;
  Needs needs;

  void check(const char* op) const;
};

// The gradients. They are uninitialised, except for that of the mask's bias, which is zero; one that is not needed is an empty
// tensor. The gradient of the residual is computed only behind a ReLU: otherwise it is the gradient of the result, which
// autograd has.
struct BackwardTensors {
  Tensor x, mask_weight, mask_bias;
  PerWeight<Tensor> scale, shift;
  Tensor residual;

  BackwardResults results() const { return {x, {mask_weight, mask_bias}, scale.list(), shift.list(), residual}; }
};
BackwardTensors gradients_of(const BackwardArguments& call);

// The elements of a list of the schema by name. They are moved out of the list, because nobody but TORCH_BOX has it.
Mask mask_of(const char* op, TensorList& list);
Branch branch_of(const char* op, const char* name, TensorList& list);
Options options_of(const char* op, std::optional<double> norm_eps, int64_t activation, double slope,
                   const std::optional<std::vector<double>>& hard_gate, int64_t final_activation);
Saved saved_of(const char* op, std::vector<Tensor>& list);
Needs needs_of(const char* op, const std::vector<bool>& list);

inline constexpr char kGlobalContext[] = "global_context";
inline constexpr char kGlobalContextInPlace[] = "global_context_";
inline constexpr char kGlobalContextBackward[] = "global_context_backward";

// A forward operator with the arguments of its schema, for TORCH_BOX: body gets them by name, checked, and may release them.
// More are the classes of x_scale and x_shift, where the operator has them.
template <const char* op, auto body, typename... More>
auto forward(Tensor& x, TensorList& mask, TensorList& scale, TensorList& shift, OptionalTensor& residual, OptionalTensor& valid,
             std::optional<double> norm_eps, int64_t activation, double slope, std::optional<std::vector<double>>& hard_gate,
             int64_t final_activation, More&... more) {
  Arguments arguments{std::move(x),
                      mask_of(op, mask),
                      branch_of(op, "scale", scale),
                      branch_of(op, "shift", shift),
                      std::move(residual),
                      std::move(valid),
                      options_of(op, norm_eps, activation, slope, hard_gate, final_activation),
                      std::move(more)...};
  arguments.check(op);
  return body(arguments);
}

// The backward operator with the arguments of its schema, for TORCH_BOX: body gets them by name, checked.
template <auto body>
BackwardResults backward(Tensor& grad, Tensor& x, TensorList& mask, TensorList& scale, TensorList& shift, OptionalTensor& valid,
                         std::optional<double> norm_eps, int64_t activation, double slope,
                         std::optional<std::vector<double>>& hard_gate, int64_t final_activation, std::vector<Tensor>& saved,
                         std::vector<bool>& needs) {
  const char* op = kGlobalContextBackward;
  const BackwardArguments arguments{
      std::move(grad),
      {std::move(x), mask_of(op, mask), branch_of(op, "scale", scale), branch_of(op, "shift", shift),
       /*residual=*/std::nullopt, std::move(valid), options_of(op, norm_eps, activation, slope, hard_gate, final_activation)},
      saved_of(op, saved),
      needs_of(op, needs)};
  arguments.check(op);
  return body(arguments);
}

// The other operators have few arguments, which are not unpacked. Their functions for both devices check them by these
// functions, so that an operator has the same rules on each.
void check_attention_pool(const char* op, const Tensor& x, const Mask& mask, const OptionalTensor& valid);
void check_attention_pool_backward(const Tensor& grad_context, const Tensor& x, const Mask& mask, const OptionalTensor& valid,
                                   const Tensor& context, const Tensor& attention, const std::vector<bool>& needs);
void check_channel_fuse(const char* op, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                        const OptionalTensor& residual, int64_t final_activation);
void check_channel_fuse_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                 int64_t final_activation, const Tensor& positive, const std::vector<bool>& needs);
void check_global_response_norm(const char* op, const Tensor& x, const Tensor& gamma, const Tensor& beta);
void check_global_response_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                         const Tensor& norms, const std::vector<bool>& needs);

}  // namespace gcnet_ext
