// Compiles the torch glue of csrc/cuda, its schemas and its kernels as they are, for CPU tensors under the emulator: the same
// operators, in a namespace of their own.
#pragma once

#include "../../../csrc/stable.h"

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(gcnet_ext_emulated, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(gcnet_ext_emulated, CPU, m, C10_UID)
