// The loops for processors with AVX-512 that round to bfloat16 by one instruction, where the others take seven. Only those of
// bfloat16 are compiled anew. (The instruction takes a number below 2^-126 for zero.)
#include "kernels.h"

#define GCNET_CAPABILITY capability_avx512_bf16

#if defined(__x86_64__)

// Standard headers come before the target is raised: their inline functions are shared with the rest of the program.
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
// g++ 12 warns of its own intrinsics, which start from a deliberately undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#include "kernels/simd_avx512.h"
#include "kernels/simd_x86.h"
#include "kernels/table.h"

namespace gcnet_ext::cpu::capability_avx512_bf16 {
inline __m256i to_bfloat16(Vec<float> value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }
}  // namespace gcnet_ext::cpu::capability_avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gcnet_ext::cpu {
// Called on every processor, so not for the target.
const Kernels* kernels_avx512_bf16() {
  static const Kernels all = [] {
    Kernels kernels = *kernels_avx512();
    kernels.map_bfloat16 = capability_avx512_bf16::kMap<BFloat16>;
    return kernels;
  }();
  return &all;
}
}  // namespace gcnet_ext::cpu

#else

namespace gcnet_ext::cpu {
const Kernels* kernels_avx512_bf16() { return nullptr; }
}  // namespace gcnet_ext::cpu

#endif
