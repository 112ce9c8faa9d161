// What the operators accept, in words. gcnet_ext/_checks.py says the same words in Python (for the shape functions and the
// reference); tests/test_bad_input.py holds the two to each other.
#pragma once

#include "stable.h"

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace gcnet_ext {

// The six weights of a branch as they come through the schema: w1, b1, norm_weight, norm_bias, w2, b2.
using BranchTensors = std::array<OptionalTensor, 6>;

namespace check {

using Sizes = std::initializer_list<int64_t>;
// Of an argument, in two parts that only an error joins: every call checks up to 14 arguments.
struct Name {
  const char* prefix;
  const char* rest;
  operator std::string() const { return std::string(prefix) + rest; }
};

// x is a floating [N, C, *spatial]; a pooled one has something to pool.
void feature_map(const char* op, const Tensor& x, bool pooled = true);
// An x that the operator writes to.
void in_place(const char* op, const Tensor& x);
// The gradient of an output that is shaped like x.
void gradient(const char* op, const Tensor& grad, const Tensor& x);
// A tensor of the accumulation dtype that the forward op returned and the backward op takes.
void side(const char* op, const char* name, const Tensor& tensor, const Tensor& x, Sizes sizes);
// A parameter: on x's device, of x's dtype or float32, of these sizes (trailing ones are free).
void parameter(const char* op, Name name, const OptionalTensor& tensor, const Tensor& x, Sizes sizes);
// The 1x1 convolution of the attention pool: weight [C] or [1, C], bias [1]; neither for average pooling.
void mask(const char* op, const char* prefix, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x);
// At least one branch, and each of them sound: w1 [H, C], b1 [H], norm [H], w2 [C, H], b2 [C]; without w2: w1 [C, C], b1 [C].
void branches(const char* op, const BranchTensors& scale, const BranchTensors& shift, const Tensor& x);

}  // namespace check

// The dtype in which sums over x are taken: float64 for float64, float32 for everything else.
ScalarType accumulation_dtype(const Tensor& x);
// The positions of x: the product of its spatial sizes.
int64_t positions(const Tensor& x);
// Hidden units of a branch, 0 when it is absent.
int64_t hidden_units(const BranchTensors& branch);

}  // namespace gcnet_ext
