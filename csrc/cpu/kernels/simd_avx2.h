// AVX2 with FMA and F16C: 32-byte vectors.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "vec.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

inline Vec<float> load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec<double> load(const double* p) { return _mm256_loadu_pd(p); }
inline Vec<float> load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline __m128i to_half(Vec<float> value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
inline void store(float* p, Vec<float> value) { _mm256_storeu_ps(p, value); }
inline void store(double* p, Vec<double> value) { _mm256_storeu_pd(p, value); }
inline void store(Half* p, Vec<float> value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_half(value)); }

inline Words widen(__m128i bits) { return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(bits)); }
inline Words widen(const BFloat16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m128i narrow(Words words) {
  const __m256i wide = reinterpret_cast<__m256i>(words);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
inline void store(BFloat16* p, Vec<float> value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(bfloat16_words(value)));
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

// The first `count` of eight elements of 16 bits, by 4, 2 and 1 at a time, because masks for such elements came with AVX-512.
template <typename scalar_t>
inline __m128i load_first_bits(const scalar_t* p, int64_t count) {
  static_assert(sizeof(scalar_t) == 2);
  uint64_t four = 0, rest = 0;
  if (count & 1) std::memcpy(&rest, p + count - 1, 2);
  if (count & 2) {
    uint32_t two;
    std::memcpy(&two, p + (count & 4), 4);
    rest = rest << 32 | two;
  }
  if (!(count & 4)) return _mm_set_epi64x(0, static_cast<int64_t>(rest));
  std::memcpy(&four, p, 8);
  return _mm_set_epi64x(static_cast<int64_t>(rest), static_cast<int64_t>(four));
}
template <typename scalar_t>
inline void store_first_bits(scalar_t* p, __m128i bits, int64_t count) {
  static_assert(sizeof(scalar_t) == 2);
  uint64_t rest = _mm_cvtsi128_si64(bits);
  if (count & 4) {
    std::memcpy(p, &rest, 8);
    p += 4;
    rest = _mm_extract_epi64(bits, 1);
  }
  if (count & 2) {
    std::memcpy(p, &rest, 4);
    p += 2;
    rest >>= 32;
  }
  if (count & 1) std::memcpy(p, &rest, 2);
}
inline Vec<float> load_first(const Half* p, int64_t count) { return _mm256_cvtph_ps(load_first_bits(p, count)); }
inline Vec<float> load_first(const BFloat16* p, int64_t count) {
  return reinterpret_cast<Vec<float>>(widen(load_first_bits(p, count)) << 16);
}
inline void store_first(Half* p, Vec<float> value, int64_t count) { store_first_bits(p, to_half(value), count); }
inline void store_first(BFloat16* p, Vec<float> value, int64_t count) {
  store_first_bits(p, narrow(bfloat16_words(value)), count);
}

// packus interleaves the halves of its arguments.
inline void store_two(BFloat16* p, Vec<float> first, Vec<float> second) {
  const __m256i packed =
      _mm256_packus_epi32(reinterpret_cast<__m256i>(bfloat16_words(first)), reinterpret_cast<__m256i>(bfloat16_words(second)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

// Stores past the caches. p must be a multiple of the vector's bytes.
inline void store_non_temporal(float* p, Vec<float> value) { _mm256_stream_ps(p, value); }
inline void store_non_temporal(double* p, Vec<double> value) { _mm256_stream_pd(p, value); }
inline void store_non_temporal(Half* p, Vec<float> value) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_half(value)); }
inline void store_non_temporal(BFloat16* p, Vec<float> value) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(bfloat16_words(value)));
}

// above_zero(v) has a bit for each lane, 0 where the lane is at most 0. where(bits, v) keeps the lanes whose bit is 1, and has
// zeros in the others.
inline uint32_t above_zero(Vec<float> v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)); }
inline uint32_t above_zero(Vec<double> v) { return _mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NLE_UQ)); }
inline Vec<float> where(uint32_t bits, Vec<float> v) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return _mm256_and_ps(_mm256_castsi256_ps(chosen), v);
}
inline Vec<double> where(uint32_t bits, Vec<double> v) {
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i chosen = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), lane), lane);
  return _mm256_and_pd(_mm256_castsi256_pd(chosen), v);
}

inline __m256 fold(Vec<float> v) { return v; }
inline __m256d fold(Vec<double> v) { return v; }

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
