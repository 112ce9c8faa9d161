// The transform of the block, on [N, C] buffers: per branch
//
//   t = w2 act(norm(w1 ctx + b1)) + b2,    or t = w1 ctx + b1 without a w2.
#pragma once

#include <memory>

#include "tensors.h"

namespace gcnet_ext::cpu {

// One branch in a forward or backward pass: its weights, ready for the kernels, and its buffers.
template <typename acc>
class BranchPass {
 public:
  BranchPass(const Branch& branch, const Options& options, int64_t samples, int64_t channels);

  // Bytes of w1 and w2: what one application of the branch reads.
  int64_t weight_bytes() const { return weight_bytes_; }

  // Whether the threads share the rows of the weights; otherwise a sample's transform is one thread's work.
  bool row_parallel() const { return (two_layers_ ? 2 : 1) * channels_ * units_ > kBatchedWeights; }

  // t of samples first <= n < first + count; if `gated` the values of the gate: sigmoid(t), or alpha t + beta before it is
  // clipped, which tells a gate that is at its corner from one that is beyond. hidden [N, hidden_stride] gets w1 ctx + b1.
  void forward(const acc* context, int64_t first, int64_t count, acc* hidden, int64_t hidden_stride, bool gated, acc* t);

  // Before backward() is called, by any thread.
  void prepare_backward();
  // grad_context += the gradient through the branch, for those samples. grad_t is kept for parameter_gradients().
  void backward(const acc* grad_t, const acc* hidden, int64_t hidden_stride, int64_t first, int64_t count, acc* grad_context);
  // After backward() of all samples: the gradients of the six weights, sums over n in order. grad_t is of all samples.
  void parameter_gradients(const acc* grad_t, const acc* context, const PerWeight<Tensor>& gradients) const;

 private:
  // y = x W^T + bias, and the gradients of x and of W.
  void linear(const Tensor& weight, Matrix<const acc> x, const std::vector<acc>& bias, bool gated, Matrix<acc> y) const;
  void linear_backward_input(const Tensor& weight, Matrix<const acc> grad_y, Matrix<acc> grad_x) const;
  void linear_backward_weight(Matrix<const acc> grad_y, Matrix<const acc> x, const Tensor& gradient) const;
  acc affine(acc normalised, int64_t j) const;
  acc activate(const acc* hidden, int64_t sample);
  void activate_backward(const acc* grad_activated, acc inverse_std, int64_t sample);

  // Up to here a sample's transform is one thread's work; above, the weights are read once for many samples, row by row.
  // (Their number, not their bytes: what this saves is loads and conversions.)
  static constexpr int64_t kBatchedWeights = 64 << 10;

  Options options_;
  int64_t samples_, channels_, units_;
  bool two_layers_;
  int64_t weight_bytes_;
  OptionalTensor w1_, w2_;
  std::vector<acc> b1_, norm_weight_, norm_bias_, b2_;
  Buffer<acc> activated_;                                   // [N, H], act(norm(hidden))
  Buffer<acc> grad_hidden_, grad_normalised_, normalised_;  // [N, H]
};

// What x is multiplied with, from the values of a hard sigmoid's gate: clip(gate, 0, 1).
template <typename acc>
void clip_gate(const acc* gate, int64_t count, acc* scale);

// grad -> grad * gate'(t), in place, from the values of the gate. The slope of the hard sigmoid is alpha at its corners too.
template <typename acc>
void apply_gate_backward(const Options& options, const acc* gate, acc* grad, int64_t count);

}  // namespace gcnet_ext::cpu
