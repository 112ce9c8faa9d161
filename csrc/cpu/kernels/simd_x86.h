// Sums across lanes of 32 bytes: simd_avx2.h and simd_avx512.h have a fold() that adds a vector up to that size.
//
// One sum and several at once add in the same order, so that a result does not depend on how many are taken together.
#pragma once

#include <immintrin.h>

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

// Everybody sees what was stored past the caches before what is stored from here on.
inline void fence() { _mm_sfence(); }

inline void sum_four(const Vec<float>* v, float* sums) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(fold(v[0]), fold(v[1])), _mm256_hadd_ps(fold(v[2]), fold(v[3])));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

template <size_t R>
  requires(R % 4 == 0)
inline void sum_each(const Vec<float> (&v)[R], float* sums) {
  [&]<size_t... i>(std::index_sequence<i...>) { (sum_four(v + 4 * i, sums + 4 * i), ...); }(std::make_index_sequence<R / 4>{});
}

inline float sum(Vec<float> v) {
  const __m256 pairs = _mm256_hadd_ps(fold(v), fold(v)), quads = _mm256_hadd_ps(pairs, pairs);
  return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}

inline double sum(Vec<double> v) {
  const __m256d pairs = _mm256_hadd_pd(fold(v), fold(v));
  return _mm_cvtsd_f64(_mm_add_sd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1)));
}

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
