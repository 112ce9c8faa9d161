// CUDA's own words, such as __global__ and threadIdx: of nvcc on a GPU, of tests/native/emulator/cuda_emulation.h under g++,
// where the same kernels run thread by thread on the CPU.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulation.h"
#endif
