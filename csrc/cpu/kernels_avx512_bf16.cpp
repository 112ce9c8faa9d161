// The kernels for processors with AVX-512 that round to bfloat16 by one instruction, where the others take seven. Only those of
// bfloat16 are compiled anew.
#if defined(__x86_64__)

#define GCNET_CAPABILITY capability_avx512_bf16
#define GCNET_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define GCNET_VECTOR_BYTES 64
#define GCNET_AVX512_BF16 1

#include "kernels/begin_target.h"
#include "kernels/simd_avx512.h"
#include "kernels/simd_x86.h"
#include "kernels/table.h"
#include "kernels/end_target.h"

namespace gcnet_ext::cpu {
const Kernels& kernels_avx512_bf16() {
  static const Kernels all = [] {
    Kernels kernels = kernels_avx512();
    std::get<MapKernels<BFloat16>>(kernels) = capability_avx512_bf16::kMap<BFloat16>;
    return kernels;
  }();
  return all;
}
}  // namespace gcnet_ext::cpu

#endif
