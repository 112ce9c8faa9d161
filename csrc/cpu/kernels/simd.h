// Loops over vectors, and what the compiler's vector extension lacks. Of that, what needs instructions of the processor (16-bit
// loads, masks, sums across lanes) is in simd_<capability>.h, which is included before this file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "vec.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

// How many elements a line of memory has.
template <typename scalar_t>
constexpr int64_t kLine = 64 / sizeof(scalar_t);

// A vector of equal lanes. (0 + value would lose the sign of -0.)
template <typename acc>
inline Vec<acc> broadcast(acc value) {
  return value - Vec<acc>{};
}

template <typename acc>
inline Vec<acc> max(Vec<acc> a, Vec<acc> b) {
  return a > b ? a : b;
}

// exp(x) = 2^k exp(r) with x = k ln 2 + r, |r| <= ln 2 / 2; coefficients of the Cephes library, at most 2 ulp.
inline Vec<float> exp(Vec<float> x) {
  typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
  constexpr float round_to_integer = 12582912.f;            // 1.5 * 2^23: adding it leaves no fraction bits
  Vec<float> clamped = x > -104.f ? x : broadcast(-104.f);  // below, the result is 0; above 89, infinity
  clamped = clamped < 89.f ? clamped : broadcast(89.f);
  const Vec<float> k = (clamped * 1.44269504088896341f + round_to_integer) - round_to_integer;
  const Vec<float> r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const IntVec exponent = __builtin_convertvector(k, IntVec),
               half = exponent >> 1;  // 2^k in two factors: k reaches -150 and 128
  const Vec<float> result =
      p * reinterpret_cast<Vec<float>>((half + 127) << 23) * reinterpret_cast<Vec<float>>((exponent - half + 127) << 23);
  return x != x ? x : result;
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::exp(x[i]);
  return x;
}

// bfloat16 is the upper half of a float. (The compiler's own conversions of vectors take twice the instructions of widen and
// narrow.)
inline Vec<float> load(const BFloat16* p) { return reinterpret_cast<Vec<float>>(widen(p) << 16); }

// Stores two vectors, one behind the other.
template <typename scalar_t>
inline void store_two(scalar_t* p, Vec<acc_t<scalar_t>> first, Vec<acc_t<scalar_t>> second) {
  store(p, first);
  store(p + kLanes<acc_t<scalar_t>>, second);
}

// The first `count` lanes from memory, with zeros in the others, and the first `count` lanes to memory. They go by way of a
// buffer, unless the capability has instructions for them.
template <typename scalar_t>
inline auto load_first(const scalar_t* p, int64_t count) {
  alignas(kVectorBytes) scalar_t buffer[kLanes<acc_t<scalar_t>>] = {};
  std::memcpy(buffer, p, count * sizeof(scalar_t));
  return load(buffer);
}

template <typename scalar_t>
inline void store_first(scalar_t* p, Vec<acc_t<scalar_t>> value, int64_t count) {
  alignas(kVectorBytes) scalar_t buffer[kLanes<acc_t<scalar_t>>];
  store(buffer, value);
  std::memcpy(p, buffer, count * sizeof(scalar_t));
}

template <typename acc, size_t R>
inline void sum_each(const Vec<acc> (&v)[R], acc* sums) {
  for (size_t r = 0; r < R; r++) sums[r] = sum(v[r]);
}

// Sets vectors to 0 one by one. The compiler makes a memset of `= {}`, which takes longer than a small block of products.
template <typename vector_t, size_t R>
inline void clear(vector_t (&v)[R]) {
  [&]<size_t... i>(std::index_sequence<i...>) { ((v[i] = vector_t{}), ...); }(std::make_index_sequence<R>{});
}

// Calls body(i, lanes) for every vector of a row of `count` elements; lanes is a constant for all but the last, partial one.
template <typename acc, typename Body>
inline void for_each_vector(int64_t count, const Body& body) {
  constexpr int64_t lanes = kLanes<acc>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, std::integral_constant<int64_t, lanes>{});
  if (i < count) body(i, count - i);
}

// The loads and stores of a body of for_each_vector: whole vectors if the number of lanes is a constant, else partial ones.
template <typename scalar_t, int64_t lanes>
inline auto load(const scalar_t* p, std::integral_constant<int64_t, lanes>) {
  return load(p);
}
template <typename scalar_t>
inline auto load(const scalar_t* p, int64_t count) {
  return load_first(p, count);
}
template <typename scalar_t, int64_t lanes>
inline void store(scalar_t* p, Vec<acc_t<scalar_t>> value, std::integral_constant<int64_t, lanes>) {
  store(p, value);
}
template <typename scalar_t>
inline void store(scalar_t* p, Vec<acc_t<scalar_t>> value, int64_t count) {
  store_first(p, value, count);
}

// Calls body(i, lanes) for every vector of a row of `count` elements that is written. Past the caches it is written by whole
// lines of memory; in the partial lines at its ends, lanes is no constant.
template <bool non_temporal, typename scalar_t, typename Body>
inline void for_each_vector_to(const scalar_t* row, int64_t count, const Body& body) {
  using acc = acc_t<scalar_t>;
  if constexpr (!non_temporal) return for_each_vector<acc>(count, body);
  constexpr int64_t lanes = kLanes<acc>, line = kLine<scalar_t>;
  const int64_t address = reinterpret_cast<intptr_t>(row) / sizeof(scalar_t);
  const int64_t begin = std::min(-address & (line - 1), count), end = begin + (count - begin) / line * line;
  const auto edge = [&](int64_t from, int64_t to) {  // in partial vectors, which have less than all lanes
    for (int64_t i = from; i < to; i += lanes - 1) body(i, std::min(lanes - 1, to - i));
  };
  edge(0, begin);
  for (int64_t i = begin; i < end; i += lanes) body(i, std::integral_constant<int64_t, lanes>{});
  edge(end, count);
}

// The store of a body of for_each_vector_to.
template <bool non_temporal, typename scalar_t, typename Lanes>
inline void store_to(scalar_t* p, Vec<acc_t<scalar_t>> value, Lanes lanes) {
  if constexpr (non_temporal && !std::is_same_v<Lanes, int64_t>) {
    store_non_temporal(p, value);
  } else {
    store(p, value, lanes);
  }
}

// Calls body with value, 1 <= value <= most, as an integral_constant.
template <int most, typename Body>
inline void with_constant(int64_t value, const Body& body) {
  if constexpr (most > 1) {
    if (value < most) return with_constant<most - 1>(value, body);
  }
  body(std::integral_constant<int, most>{});
}

// Calls body with an integral_constant<bool> for every flag: a loop is compiled for each combination.
template <typename Body>
inline void with_flags(const Body& body) {
  body();
}
template <typename Body, typename... Flags>
inline void with_flags(const Body& body, bool flag, Flags... flags) {
  if (flag) {
    with_flags([&](auto... rest) { body(std::true_type{}, rest...); }, flags...);
  } else {
    with_flags([&](auto... rest) { body(std::false_type{}, rest...); }, flags...);
  }
}

// Calls body(first_row, integral_constant) with R rows at a time, then with four of the rest at a time, and then one by one.
template <int R, typename Body>
inline void for_each_rows(int64_t begin, int64_t end, const Body& body) {
  for (; begin + R <= end; begin += R) body(begin, std::integral_constant<int, R>{});
  if constexpr (R > 1) for_each_rows<(R > 4 ? 4 : 1)>(begin, end, body);
}

// Calls body(first_row, integral_constant) with R rows at a time, and then once with all of the rest.
template <int R, typename Body>
inline void for_each_batch(int64_t count, const Body& body) {
  for (int64_t first = 0; first < count; first += R) {
    with_constant<R>(std::min<int64_t>(R, count - first), [&](auto rows) { body(first, rows); });
  }
}

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
