// Portable: 16-byte vectors, which every compiler maps to SSE2 or NEON, and no header of any processor.
#pragma once

#include <cstring>

#include "vec.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

inline Vec<float> load(const float* p) {
  Vec<float> value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline Vec<double> load(const double* p) {
  Vec<double> value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline Vec<float> load(const Half* p) { return Vec<float>{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }

inline void store(float* p, Vec<float> value) { std::memcpy(p, &value, sizeof value); }
inline void store(double* p, Vec<double> value) { std::memcpy(p, &value, sizeof value); }
inline void store(Half* p, Vec<float> value) {
  for (int i = 0; i < kLanes<float>; i++) p[i] = Half(value[i]);
}

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
inline Words widen(const BFloat16* p) {
  HalfWords bits;
  std::memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, Words);
}
inline void store(BFloat16* p, Vec<float> value) {
  const HalfWords bits = __builtin_convertvector(bfloat16_words(value), HalfWords);
  std::memcpy(p, &bits, sizeof bits);
}

// above_zero(v) has a bit for each lane, 0 where the lane is at most 0. where(bits, v) keeps the lanes whose bit is 1, and has
// zeros in the others.
template <typename vector_t>
inline uint32_t above_zero(vector_t v) {
  uint32_t bits = 0;
  for (size_t i = 0; i < kVectorBytes / sizeof v[0]; i++) bits |= static_cast<uint32_t>(!(v[i] <= 0)) << i;
  return bits;
}
template <typename vector_t>
inline vector_t where(uint32_t bits, vector_t v) {
  for (size_t i = 0; i < kVectorBytes / sizeof v[0]; i++) v[i] = bits >> i & 1 ? v[i] : 0;
  return v;
}

// There is no portable store past the caches.
template <typename scalar_t>
inline void store_non_temporal(scalar_t* p, Vec<acc_t<scalar_t>> value) {
  store(p, value);
}
inline void fence() {}

inline float sum(Vec<float> v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline double sum(Vec<double> v) { return v[0] + v[1]; }

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
