// AVX2 with FMA and F16C: 32-byte vectors.
#pragma once

#include <immintrin.h>

#include "../kernels.h"

#define GCNET_CAPABILITY capability_avx2

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

constexpr int kVectorBytes = 32;
template <typename acc>
constexpr int64_t kLanes = kVectorBytes / sizeof(acc);

template <typename acc>
struct VecOf {
  typedef acc type __attribute__((vector_size(kVectorBytes)));
};
template <typename acc>
using Vec = typename VecOf<acc>::type;

inline Vec<float> load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec<double> load(const double* p) { return _mm256_loadu_pd(p); }
inline Vec<float> load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void store(float* p, Vec<float> value) { _mm256_storeu_ps(p, value); }
inline void store(double* p, Vec<double> value) { _mm256_storeu_pd(p, value); }
inline void store(Half* p, Vec<float> value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

inline __m256i first_words(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_quads(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vec<float> load_first(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_words(count)); }
inline Vec<double> load_first(const double* p, int64_t count) { return _mm256_maskload_pd(p, first_quads(count)); }
inline void store_first(float* p, Vec<float> value, int64_t count) { _mm256_maskstore_ps(p, first_words(count), value); }
inline void store_first(double* p, Vec<double> value, int64_t count) { _mm256_maskstore_pd(p, first_quads(count), value); }

inline __m256 fold(Vec<float> v) { return v; }
inline __m256d fold(Vec<double> v) { return v; }

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
