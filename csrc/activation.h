// The activations that a call can choose between the layers of a branch, and behind the result, by their numbers in ops.cpp.
#pragma once

#include <cstdint>

namespace gcnet_ext {

enum class Activation : int64_t { none, relu, silu, gelu, gelu_tanh, hardswish, leaky_relu };
enum class FinalActivation : int64_t { none, relu };

}  // namespace gcnet_ext
