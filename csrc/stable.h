// Every file that needs a tensor of torch includes this one, so that the ABI target of the compiled code is set in one place.
// csrc/exports.cpp, gcnet_ext/_build.py and setup.py name the same version.
#pragma once

// LibTorch stable ABI of torch 2.11: one binary runs on every later torch, and including ATen is a compile error.
#define TORCH_TARGET_VERSION 0x020B000000000000

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>

namespace gcnet_ext {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace gcnet_ext
