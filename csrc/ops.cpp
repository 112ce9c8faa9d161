// Every operator of the package, on one screen. Kernels register themselves for their device (csrc/cpu, csrc/cuda);
// shape functions and autograd live in gcnet_ext/_library.py.
//
// N samples, C channels, P positions, H hidden units of a branch. "acc" is the accumulation dtype: float64 for a float64 x,
// float32 otherwise. A gradient that is not needed comes back as an empty tensor. An operator with a trailing underscore
// overwrites x with its result, and has no gradient.
#include "stable.h"

STABLE_TORCH_LIBRARY(gcnet_ext, m) {
  // -> context [N, C] acc; attention [N, P] acc, the softmax over positions ([N, 0] without a weight: average pooling)
  m.def("attention_pool(Tensor x, Tensor? weight, Tensor? bias) -> (Tensor context, Tensor attention)");
  m.def(
      "attention_pool_backward(Tensor grad_context, Tensor x, Tensor? weight, Tensor context, Tensor attention, "
      "bool need_x, bool need_weight) -> (Tensor grad_x, Tensor grad_weight)");

  // -> x * scale + shift; scale and shift are [N, C]
  m.def("channel_fuse(Tensor x, Tensor? scale, Tensor? shift) -> Tensor");
  m.def("channel_fuse_(Tensor(a!) x, Tensor? scale, Tensor? shift) -> ()");
  m.def(
      "channel_fuse_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? shift, "
      "bool need_x, bool need_scale, bool need_shift) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)");

  // The whole block. act is ReLU or SiLU, the gate a sigmoid or clip(gate_alpha t + gate_beta, 0, 1); the choices are bools
  // because torch 2.13 leaks a str argument in every call (pytorch#191340). A branch is t = w2 act(norm(w1 context + b1)) + b2,
  // or t = w1 context + b1 without a w2.
  // -> out like x; context [N, C] acc; attention [N, P] acc; hidden [N, H of scale + H of shift] acc, before the norm;
  //    gate_values [N, C] acc, the sigmoid that x was multiplied with, or gate_alpha t + gate_beta before it was clipped
  //    ([N, 0] without a scale branch)
  m.def(
      "global_context(Tensor x, Tensor? mask_weight, Tensor? mask_bias, "
      "Tensor? scale_w1, Tensor? scale_b1, Tensor? scale_norm_weight, Tensor? scale_norm_bias, Tensor? scale_w2, Tensor? "
      "scale_b2, "
      "Tensor? shift_w1, Tensor? shift_b1, Tensor? shift_norm_weight, Tensor? shift_norm_bias, Tensor? shift_w2, Tensor? "
      "shift_b2, "
      "bool norm, float eps, bool silu, bool hard_sigmoid, float gate_alpha, float gate_beta) "
      "-> (Tensor out, Tensor context, Tensor attention, Tensor hidden, Tensor gate_values)");
  // The same, for where nothing is differentiated: out alone.
  m.def(
      "global_context_inference(Tensor x, Tensor? mask_weight, Tensor? mask_bias, "
      "Tensor? scale_w1, Tensor? scale_b1, Tensor? scale_norm_weight, Tensor? scale_norm_bias, Tensor? scale_w2, Tensor? "
      "scale_b2, "
      "Tensor? shift_w1, Tensor? shift_b1, Tensor? shift_norm_weight, Tensor? shift_norm_bias, Tensor? shift_w2, Tensor? "
      "shift_b2, "
      "bool norm, float eps, bool silu, bool hard_sigmoid, float gate_alpha, float gate_beta) "
      "-> Tensor");
  m.def(
      "global_context_(Tensor(a!) x, Tensor? mask_weight, Tensor? mask_bias, "
      "Tensor? scale_w1, Tensor? scale_b1, Tensor? scale_norm_weight, Tensor? scale_norm_bias, Tensor? scale_w2, Tensor? "
      "scale_b2, "
      "Tensor? shift_w1, Tensor? shift_b1, Tensor? shift_norm_weight, Tensor? shift_norm_bias, Tensor? shift_w2, Tensor? "
      "shift_b2, "
      "bool norm, float eps, bool silu, bool hard_sigmoid, float gate_alpha, float gate_beta) "
      "-> ()");
  m.def(
      "global_context_backward(Tensor grad, Tensor x, Tensor? mask_weight, "
      "Tensor? scale_w1, Tensor? scale_b1, Tensor? scale_norm_weight, Tensor? scale_norm_bias, Tensor? scale_w2, Tensor? "
      "scale_b2, "
      "Tensor? shift_w1, Tensor? shift_b1, Tensor? shift_norm_weight, Tensor? shift_norm_bias, Tensor? shift_w2, Tensor? "
      "shift_b2, "
      "bool norm, float eps, bool silu, bool hard_sigmoid, float gate_alpha, float gate_beta, "
      "Tensor context, Tensor attention, Tensor hidden, Tensor gate_values, "
      "bool need_x, bool need_mask, bool need_scale, bool need_shift) "
      "-> (Tensor grad_x, Tensor grad_mask_weight, "
      "Tensor grad_scale_w1, Tensor grad_scale_b1, Tensor grad_scale_norm_weight, Tensor grad_scale_norm_bias, "
      "Tensor grad_scale_w2, Tensor grad_scale_b2, "
      "Tensor grad_shift_w1, Tensor grad_shift_b1, Tensor grad_shift_norm_weight, Tensor grad_shift_norm_bias, "
      "Tensor grad_shift_w2, Tensor grad_shift_b2)");
}
