// Vec<acc>: a vector of acc (float or double), of GCNET_VECTOR_BYTES, from the compiler's vector extension. Operators come with
// it, and one source compiles to SSE, AVX2, AVX-512 or NEON: each time in a namespace of its own, GCNET_CAPABILITY.
#pragma once

#include "types.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

constexpr int kVectorBytes = GCNET_VECTOR_BYTES;
template <typename acc>
constexpr int64_t kLanes = kVectorBytes / sizeof(acc);

template <typename acc>
struct VecOf {
  typedef acc type __attribute__((vector_size(kVectorBytes)));
};
template <typename acc>
using Vec = typename VecOf<acc>::type;
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// The words whose lower halves are the bfloat16 of these floats, rounded to nearest, ties to even.
inline Words bfloat16_words(Vec<float> value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? Words{} + 0x7fc0u : rounded;
}

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
