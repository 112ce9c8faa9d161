// The kernels for any processor.
#define GCNET_CAPABILITY capability_default
#define GCNET_VECTOR_BYTES 16

#include "kernels/simd_default.h"
#include "kernels/table.h"

namespace gcnet_ext::cpu {
const Kernels& kernels_default() { return capability_default::kAll<>; }
}  // namespace gcnet_ext::cpu
