// Included before csrc/ops.cpp and before each csrc/cuda/*.cu (emulated.py), this registers the operators and their CUDA code a
// second time: for CPU tensors, and in the namespace gcnet_ext_emulated.
#pragma once

#include "../../../csrc/stable.h"

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(gcnet_ext_emulated, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(gcnet_ext_emulated, CPU, m, C10_UID)
