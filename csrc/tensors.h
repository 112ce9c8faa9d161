// What the operators of both devices do with tensors, before their kernels see plain pointers.
#pragma once

#include "layout.h"

#include <stdexcept>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace gcnet_ext {

// Calls body with a value of the C++ type of this dtype.
template <typename Body>
auto dispatch(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double: return body(double{});
    case ScalarType::Float: return body(float{});
    case ScalarType::Half: return body(c10::Half{});
    case ScalarType::BFloat16: return body(c10::BFloat16{});
    default:
      throw std::runtime_error("gcnet_ext: a tensor must have dtype float16, bfloat16, float32 or float64, got number " +
                               std::to_string(static_cast<int>(dtype)) + " of torch's");
  }
}

inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
inline OptionalTensor dense(const OptionalTensor& tensor) { return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt; }

// An empty tensor, which stands for a gradient that is not needed.
inline Tensor no_gradient(const Tensor& x) { return empty(x, {0}, x.scalar_type()); }
// An uninitialised gradient of a parameter, dense; empty when it is not needed.
inline Tensor gradient_of(bool needed, const OptionalTensor& parameter, const Tensor& x) {
  return needed && parameter ? empty_like_parameter(*parameter) : no_gradient(x);
}
// Writes the gradient of a parameter on which the result does not depend. (On CUDA a kernel that runs anyway writes it, because
// this would be a launch of its own.)
inline void write_zero_gradient(const Tensor& gradient) {
  if (gradient.numel() > 0) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(gradient.get()));
}
// The residual in the layout of x. It is copied if an in-place call could overwrite an element of it before that is read.
inline OptionalTensor residual_of(const OptionalTensor& residual, const Tensor& x, bool in_place) {
  if (!residual) return std::nullopt;
  const bool apart = !in_place || overlap(*residual, x) != Overlap::unknown;
  return native_like(apart ? *residual : torch::stable::clone(*residual), x);
}
// The uninitialised bits of the final ReLU; the tensor is empty if there is no such ReLU.
inline Tensor empty_bits(const Tensor& x, bool has_relu) {
  return empty(x, {x.size(0), has_relu ? bytes_of_bits(x) : 0}, ScalarType::Byte);
}

}  // namespace gcnet_ext
