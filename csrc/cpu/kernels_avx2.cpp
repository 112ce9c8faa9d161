// The loops for processors with AVX2, FMA and F16C.
#include "kernels.h"

#define GCNET_CAPABILITY capability_avx2

#if defined(__x86_64__)

// Standard headers come before the target is raised: their inline functions are shared with the rest of the program.
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels/simd_avx2.h"
#include "kernels/simd_x86.h"
#include "kernels/full_table.h"

namespace gcnet_ext::cpu {
const Kernels* kernels_avx2() { return &capability_avx2::kTable; }
}  // namespace gcnet_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace gcnet_ext::cpu {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace gcnet_ext::cpu

#endif
