// The loops for processors with AVX-512 (F, BW, DQ, VL) and FMA.
#include "kernels.h"

#define GCNET_CAPABILITY capability_avx512

#if defined(__x86_64__)

// Standard headers come before the target is raised: their inline functions are shared with the rest of the program.
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
// g++ 12 warns of its own intrinsics, which start from a deliberately undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "kernels/simd_avx512.h"
#include "kernels/simd_x86.h"
#include "kernels/full_table.h"

namespace gcnet_ext::cpu {
namespace capability_avx512 {
inline __m256i to_bfloat16(Vec<float> value) { return _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bfloat16_words(value))); }
}  // namespace capability_avx512

const Kernels* kernels_avx512() { return &capability_avx512::kTable; }
}  // namespace gcnet_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace gcnet_ext::cpu {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace gcnet_ext::cpu

#endif
