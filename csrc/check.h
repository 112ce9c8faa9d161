// What the operators accept, as rules. An error says which argument of which operator breaks one; gcnet_ext/ops/_checks.py then
// says in words what the argument must be and what it was, and tests/properties/test_bad_input.py holds the two to each other.
#pragma once

#include "stable.h"

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace gcnet_ext::check {

using Sizes = std::initializer_list<int64_t>;

// An argument's name as prefix and rest, so that no string is built unless a check fails.
struct Name {
  const char* prefix;
  const char* rest;
};

// What a parameter must have in common with x. It is asked once for all of them, as each question is a call into libtorch.
struct Like {
  torch::stable::Device device;
  ScalarType dtype;

  Like(const Tensor& x) : device(x.device()), dtype(x.scalar_type()) {}
};

// Throws "gcnet_ext::op: name is not valid" unless the rule holds.
void require(bool holds, const char* op, Name name);
// A list of the schema has as many elements as are wanted.
void count(const char* op, const char* name, size_t elements, size_t wanted);

// x is a floating [N, C, *spatial] with channels, and with positions if it is pooled.
void feature_map(const char* op, const Tensor& x, bool pooled = true);
// An x that the operator writes to: no two of its elements share memory, and a residual is x itself or lies elsewhere.
void in_place(const char* op, const Tensor& x, const OptionalTensor& residual);
// What is added to the result: like x in everything but its strides.
void residual(const char* op, const OptionalTensor& residual, const Tensor& x);
// Which positions count in the pool: bool, [N or 1, *spatial].
void valid(const char* op, const OptionalTensor& valid, const Tensor& x);
// The gradient of an output that is shaped like x.
void gradient(const char* op, const Tensor& grad, const Tensor& x);
// A tensor of the accumulation dtype that the forward operator returned and the backward operator takes.
void saved(const char* op, const char* name, const Tensor& tensor, const Tensor& x, Sizes sizes);
// The bits of the final ReLU; without that ReLU there are none.
void positive(const char* op, const Tensor& tensor, const Tensor& x, bool has_relu);
// A parameter: on x's device, of x's dtype or float32, of these sizes (trailing ones are free).
void parameter(const char* op, Name name, const OptionalTensor& tensor, const Like& x, Sizes sizes);
// The 1x1 convolution of the attention pool: weight [C] or [1, C], bias [1]. Average pooling has neither.
void mask(const char* op, const char* prefix, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x);

}  // namespace gcnet_ext::check
