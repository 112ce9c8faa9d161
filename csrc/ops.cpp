// Every operator of the package, on one screen. Kernels register themselves for their device (csrc/cpu, csrc/cuda); what
// Python knows of an operator, the shapes of its results and its gradients among it, is in gcnet_ext/ops/<op>.py.
//
// N samples, C channels, P positions, H hidden units of a branch. "acc" is the accumulation dtype: float64 for a float64 x,
// float32 otherwise. A gradient that is not needed comes back as an empty tensor. An operator with a trailing underscore
// overwrites x with its result, and has no gradient.
//
//   x, residual         [N, C, *spatial]; the residual is added to the result
//   valid               bool, [N or 1, *spatial]: the positions that count in the pool
//   mask                [weight, bias] of the attention pool's 1x1 convolution; without a weight the pool averages
//   scale, shift        [w1, b1, norm_weight, norm_bias, w2, b2] of a branch t = w2 act(norm(w1 context + b1)) + b2;
//                       without a w2 it is t = w1 context + b1, and without a w1 there is no such branch
//   norm_eps            None: no norm
//   activation          act: 0 none, 1 ReLU, 2 SiLU, 3 GELU by erf, 4 GELU by tanh, 5 Hardswish, 6 LeakyReLU with the slope
//   hard_gate           [alpha, beta] of the gate clip(alpha t + beta, 0, 1); None: the gate is a sigmoid
//   final_activation    of the result: 0 none, 1 ReLU
//   x_scale, x_shift    [C]: a BatchNorm in evaluation in front of the block, x * x_scale + x_shift
//   positive            what backward needs of the final ReLU: a bit for each element of out, which is 0 where the element is at
//                       most 0, in the order of a sample's memory. Each row (a channel, or in channels_last a position) begins
//                       with a byte of its own: uint8 [N, C ceil(P / 8)] or [N, P ceil(C / 8)]; [N, 0] without that ReLU
//
// A list always has all its elements, None among them: AOTInductor cannot pass an empty one. Choices are numbers, because torch
// 2.13 leaks a str argument in every call (pytorch#191340).
#include "stable.h"

STABLE_TORCH_LIBRARY(gcnet_ext, m) {
  // -> context [N, C] acc; attention [N, P] acc, the softmax over positions ([N, 0] without a weight: average pooling)
  m.def("attention_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor? valid) -> (Tensor context, Tensor attention)");
  // needs: x, weight, bias. The gradient of the bias is zero, because it shifts every logit of a softmax alike.
  m.def(
      "attention_pool_backward(Tensor grad_context, Tensor x, Tensor? weight, Tensor? bias, Tensor? valid, Tensor context, "
      "Tensor attention, bool[] needs) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");

  // -> act(x * scale + shift + residual); scale and shift are [N, C]
  m.def(
      "channel_fuse(Tensor x, Tensor? scale, Tensor? shift, Tensor? residual, int final_activation) "
      "-> (Tensor out, Tensor positive)");
  m.def("channel_fuse_(Tensor(a!) x, Tensor? scale, Tensor? shift, Tensor? residual, int final_activation) -> ()");
  // needs: x, scale, shift, residual. The gradient of the residual is computed behind a ReLU; without one it is grad.
  m.def(
      "channel_fuse_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? shift, int final_activation, Tensor positive, "
      "bool[] needs) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, Tensor grad_residual)");

  // -> x * (1 + gamma * G / (mean of G over the channels + eps)) + beta, with gamma and beta [C]; norms: G [N, C] acc, the
  //    square root of the sum of squares of x over the positions
  m.def("global_response_norm(Tensor x, Tensor gamma, Tensor beta, float eps) -> (Tensor out, Tensor norms)");
  // needs: x, gamma, beta
  m.def(
      "global_response_norm_backward(Tensor grad, Tensor x, Tensor gamma, Tensor beta, float eps, Tensor norms, bool[] needs) "
      "-> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta)");

  // The whole block: act(x * gate(t_scale) + t_shift + residual), with the context of x in both branches.
  // -> out like x; context [N, C] acc; attention [N, P] acc; hidden [N, H of scale + H of shift] acc, before the norm;
  //    gate_values [N, C] acc, the sigmoid that x was multiplied with, or alpha t + beta before it was clipped ([N, 0] without
  //    a scale branch); positive
  m.def(
      "global_context(Tensor x, Tensor?[] mask, Tensor?[] scale, Tensor?[] shift, Tensor? residual, Tensor? valid, "
      "float? norm_eps, int activation, float slope, float[]? hard_gate, int final_activation) "
      "-> (Tensor out, Tensor context, Tensor attention, Tensor hidden, Tensor gate_values, Tensor positive)");
  // The first of these results alone, where nothing is differentiated.
  m.def(
      "global_context_inference(Tensor x, Tensor?[] mask, Tensor?[] scale, Tensor?[] shift, Tensor? residual, Tensor? valid, "
      "float? norm_eps, int activation, float slope, float[]? hard_gate, int final_activation) -> Tensor");
  m.def(
      "global_context_(Tensor(a!) x, Tensor?[] mask, Tensor?[] scale, Tensor?[] shift, Tensor? residual, Tensor? valid, "
      "float? norm_eps, int activation, float slope, float[]? hard_gate, int final_activation) -> ()");
  // These two compute the block of x * x_scale + x_shift, without writing that to memory. They are operators of their own because
  // every argument takes time in every call. They exist on the CPU only.
  m.def(
      "normed_global_context_inference(Tensor x, Tensor?[] mask, Tensor?[] scale, Tensor?[] shift, Tensor? residual, "
      "Tensor? valid, float? norm_eps, int activation, float slope, float[]? hard_gate, int final_activation, Tensor x_scale, "
      "Tensor x_shift) -> Tensor");
  m.def(
      "normed_global_context_(Tensor(a!) x, Tensor?[] mask, Tensor?[] scale, Tensor?[] shift, Tensor? residual, "
      "Tensor? valid, float? norm_eps, int activation, float slope, float[]? hard_gate, int final_activation, Tensor x_scale, "
      "Tensor x_shift) -> ()");
  // saved: context, attention, hidden, gate_values, positive. needs: x, the mask's weight and bias, scale, shift, residual.
  m.def(
      "global_context_backward(Tensor grad, Tensor x, Tensor?[] mask, Tensor?[] scale, Tensor?[] shift, Tensor? valid, "
      "float? norm_eps, int activation, float slope, float[]? hard_gate, int final_activation, Tensor[] saved, bool[] needs) "
      "-> (Tensor grad_x, Tensor[] grad_mask, Tensor[] grad_scale, Tensor[] grad_shift, Tensor grad_residual)");
}
