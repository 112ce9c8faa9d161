// The loops for any processor.
#define GCNET_CAPABILITY capability_default

#include "kernels/simd_default.h"
#include "kernels/full_table.h"

namespace gcnet_ext::cpu {
const Kernels* kernels_default() { return &capability_default::kTable; }
}  // namespace gcnet_ext::cpu
