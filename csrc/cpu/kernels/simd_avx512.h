// AVX-512 F, BW, DQ and VL with FMA: 64-byte vectors and masks. GCNET_AVX512_BF16 tells whether bfloat16 has instructions.
#pragma once

#if !defined(__clang__)
// g++ 12 warns of its own intrinsics, which start from a deliberately undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "vec.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

inline Vec<float> load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec<double> load(const double* p) { return _mm512_loadu_pd(p); }
inline Vec<float> load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline __m256i to_half(Vec<float> value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
inline void store(float* p, Vec<float> value) { _mm512_storeu_ps(p, value); }
inline void store(double* p, Vec<double> value) { _mm512_storeu_pd(p, value); }
inline void store(Half* p, Vec<float> value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(value)); }

// _mm512_cvtneps_pbh takes a number below 2^-126 for zero; the other branch does not.
inline __m256i to_bfloat16(Vec<float> value) {
#if GCNET_AVX512_BF16
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
  return _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bfloat16_words(value)));
#endif
}
inline void store(BFloat16* p, Vec<float> value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(value)); }

inline Words widen(const BFloat16* p) {
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vec<float> load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
inline Vec<double> load_first(const double* p, int64_t count) { return _mm512_maskz_loadu_pd(first(count), p); }
inline Vec<float> load_first(const Half* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
}
inline Vec<float> load_first(const BFloat16* p, int64_t count) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_first(float* p, Vec<float> value, int64_t count) { _mm512_mask_storeu_ps(p, first(count), value); }
inline void store_first(double* p, Vec<double> value, int64_t count) { _mm512_mask_storeu_pd(p, first(count), value); }
inline void store_first(Half* p, Vec<float> value, int64_t count) { _mm256_mask_storeu_epi16(p, first(count), to_half(value)); }
inline void store_first(BFloat16* p, Vec<float> value, int64_t count) {
  _mm256_mask_storeu_epi16(p, first(count), to_bfloat16(value));
}

// Sixteen sums at once, added as sum() adds: lanes 8 apart, then 1, 2 and 4 apart.
inline void sum_each(const Vec<float> (&v)[16], float* sums) {
  const auto add_halves = [](__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  };
  const auto add_pairs = [](__m512 a, __m512 b) { return _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd); };
  const auto eight = [&](const Vec<float>* a) {
    return add_pairs(add_pairs(add_halves(a[0], a[4]), add_halves(a[1], a[5])),
                     add_pairs(add_halves(a[2], a[6]), add_halves(a[3], a[7])));
  };
  const __m512 first = eight(v), last = eight(v + 8);
  _mm512_storeu_ps(sums, _mm512_shuffle_f32x4(first, last, 0x88) + _mm512_shuffle_f32x4(first, last, 0xdd));
}

// Stores past the caches. p must be a multiple of the vector's bytes.
inline void store_non_temporal(float* p, Vec<float> value) { _mm512_stream_ps(p, value); }
inline void store_non_temporal(double* p, Vec<double> value) { _mm512_stream_pd(p, value); }
inline void store_non_temporal(Half* p, Vec<float> value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_half(value));
}
inline void store_non_temporal(BFloat16* p, Vec<float> value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(value));
}

// above_zero(v) has a bit for each lane, 0 where the lane is at most 0. where(bits, v) keeps the lanes whose bit is 1, and has
// zeros in the others.
inline uint32_t above_zero(Vec<float> v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
inline uint32_t above_zero(Vec<double> v) { return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NLE_UQ); }
inline Vec<float> where(uint32_t bits, Vec<float> v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }
inline Vec<double> where(uint32_t bits, Vec<double> v) { return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), v); }

inline __m256 fold(Vec<float> v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
inline __m256d fold(Vec<double> v) { return _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)); }

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
