// A norm in front of the block: an affine map of each channel, y = a x + b, as a BatchNorm in evaluation is. The block of y is
// computed from x, and y is never written to memory:
//
//   w.y_p = (w a).x_p + w.b, where the softmax takes the last term away;    context of y = a (context of x) + b;
//   y s + t = x (a s) + (b s + t).
#pragma once

#include "tensors.h"
#include "valid.h"

namespace gcnet_ext::cpu {

template <typename acc>
class InputNorm {
 public:
  // a and b are [C]; without them there is no norm, and nothing below changes anything.
  InputNorm(const OptionalTensor& scale, const OptionalTensor& shift) : a_(to_acc<acc>(scale)), b_(to_acc<acc>(shift)) {}
  explicit operator bool() const { return !a_.empty(); }

  // w -> w a; average pooling has no w.
  void apply_to_weight(std::vector<acc>& weight) const {
    if (!*this) return;
    for (size_t c = 0; c < weight.size(); c++) weight[c] *= a_[c];
  }
  // The context of x -> that of y. It stays 0 where no position counts.
  void apply_to_context(const Valid& valid, Matrix<acc> context) const {
    if (!*this) return;
    for (int64_t i = 0; i < context.rows; i++) {
      if (valid.count(i) == 0) continue;
      acc* const row = context.row(i);
      for (int64_t c = 0; c < context.columns; c++) row[c] = a_[c] * row[c] + b_[c];
    }
  }
  // (s, t) -> (a s, b s + t). Where the block has no s or no t, the norm writes its own.
  void apply_to_fusion(bool has_scale, Matrix<acc> scale, bool has_shift, Matrix<acc> shift) const {
    if (!*this) return;
    for (int64_t i = 0; i < scale.rows; i++) {
      acc *const s = scale.row(i), *const t = shift.row(i);
      for (int64_t c = 0; c < scale.columns; c++) {
        const acc factor = has_scale ? s[c] : acc(1), term = has_shift ? t[c] : acc(0);
        s[c] = a_[c] * factor;
        t[c] = b_[c] * factor + term;
      }
    }
  }

 private:
  std::vector<acc> a_, b_;
};

}  // namespace gcnet_ext::cpu
