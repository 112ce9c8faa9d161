// The kernels for processors with AVX2, FMA and F16C.
#if defined(__x86_64__)

#define GCNET_CAPABILITY capability_avx2
#define GCNET_TARGET "avx2,fma,f16c"
#define GCNET_VECTOR_BYTES 32

#include "kernels/begin_target.h"
#include "kernels/simd_avx2.h"
#include "kernels/simd_x86.h"
#include "kernels/table.h"
#include "kernels/end_target.h"

namespace gcnet_ext::cpu {
const Kernels& kernels_avx2() { return capability_avx2::kAll<>; }
}  // namespace gcnet_ext::cpu

#endif
