// The kernels for processors with AVX-512 (F, BW, DQ, VL) and FMA.
#if defined(__x86_64__)

#define GCNET_CAPABILITY capability_avx512
#define GCNET_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define GCNET_VECTOR_BYTES 64
#define GCNET_AVX512_BF16 0

#include "kernels/begin_target.h"
#include "kernels/simd_avx512.h"
#include "kernels/simd_x86.h"
#include "kernels/table.h"
#include "kernels/end_target.h"

namespace gcnet_ext::cpu {
const Kernels& kernels_avx512() { return capability_avx512::kAll<>; }
}  // namespace gcnet_ext::cpu

#endif
