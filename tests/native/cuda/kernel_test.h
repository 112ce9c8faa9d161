// What the kernel tests share: random feature maps in every layout, buffers of exactly their size (so that AddressSanitizer
// sees the first byte past the end) that start as NaN, and the comparison with sums in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../../csrc/cuda/feature_map.cuh"
#include "../../../csrc/cuda/parameter.cuh"
#include "../../../csrc/cuda/launch.h"

namespace kernel_test {

using gcnet_ext::cuda::BFloat16;
using gcnet_ext::cuda::Extent;
using gcnet_ext::cuda::Half;
using gcnet_ext::cuda::Map;
using gcnet_ext::cuda::Parameter;

template <class T>
constexpr const char* kName = "float64";
template <>
inline constexpr const char* kName<float> = "float32";
template <>
inline constexpr const char* kName<Half> = "float16";
template <>
inline constexpr const char* kName<BFloat16> = "bfloat16";

// A random number, uniform in [-1, 1]. The sequence is the same on every machine.
inline double random_number() {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<double>(state >> 11) / (1ull << 52) - 1;
}

template <class T>
std::vector<T> random_values(int64_t count, double scale = 1, double mean = 0) {
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(random_number() * scale + mean);
  return values;
}

// Memory that nobody has written, full of NaN.
template <class T>
std::vector<T> unwritten(int64_t count) {
  std::vector<T> values(count);
  if (count > 0) std::memset(static_cast<void*>(values.data()), 0xff, count * sizeof(T));
  return values;
}

template <class T>
Parameter<T> parameter(const std::vector<T>& values) {
  return {values.data(), false};
}

// How a feature map lies in memory: `offset` elements into its buffer, with `gap` elements between its samples.
struct Shape {
  int64_t samples, channels, positions;
  bool channels_last = false;
  int64_t offset = 0, gap = 0;

  Extent extent() const { return {samples, channels, positions, channels_last}; }
  int64_t sample_stride() const { return channels * positions + gap; }
  int64_t elements() const { return offset + samples * sample_stride() - gap; }
  std::string text() const {
    std::string text = std::to_string(samples) + "x" + std::to_string(channels) + "x" + std::to_string(positions);
    if (channels_last) text += " channels_last";
    if (offset) text += " offset " + std::to_string(offset);
    if (gap) text += " gap " + std::to_string(gap);
    return text;
  }
};

template <class T>
struct FeatureMap {
  Shape shape;
  std::vector<T> values;

  static FeatureMap random(const Shape& shape) { return {shape, random_values<T>(shape.elements(), 1, 0.25)}; }
  static FeatureMap empty(const Shape& shape) { return {shape, unwritten<T>(shape.elements())}; }

  // The stride of a dimension of size one is arbitrary; here it is one that the dense layout does not have.
  int64_t channel_stride() const { return shape.channels_last || shape.channels == 1 ? 1 : shape.positions; }
  int64_t position_stride() const { return shape.channels_last ? shape.channels : 1; }
  Map<const T> read() const {
    return {values.data() + shape.offset, shape.sample_stride(), channel_stride(), position_stride()};
  }
  Map<T> write() { return {values.data() + shape.offset, shape.sample_stride(), channel_stride(), position_stride()}; }
  double at(int64_t n, int64_t c, int64_t p) const {
    return static_cast<double>(values[shape.offset + n * shape.sample_stride() + c * channel_stride() + p * position_stride()]);
  }
};

// Which positions count, [N, P]: at least the first of every sample; but of several samples, the last has none.
inline std::vector<uint8_t> random_valid(int64_t samples, int64_t positions) {
  std::vector<uint8_t> valid(samples * positions);
  for (size_t i = 0; i < valid.size(); i++) valid[i] = i % positions == 0 || random_number() > 0;
  if (samples > 1) std::fill(valid.end() - positions, valid.end(), 0);
  return valid;
}

// Makes a NaN of x wherever a position does not count.
template <class T>
void forget(FeatureMap<T>& x, const std::vector<uint8_t>& valid) {
  const Map<T> map = x.write();
  for (size_t i = 0; i < valid.size(); i++) {
    for (int64_t c = 0; c < x.shape.channels && !valid[i]; c++) {
      *map.at(i / x.shape.positions, c, i % x.shape.positions) = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

// The bytes that hold a bit for every element. Each row, a channel or in channels_last a position, begins with a byte of its
// own.
inline int64_t bytes_of_bits(const Shape& shape) {
  const int64_t rows = shape.channels_last ? shape.positions : shape.channels;
  return shape.samples * rows * ((shape.channels * shape.positions / rows + 7) / 8);
}

// Memory of exactly the size that was asked for.
class TestWorkspace final : public gcnet_ext::cuda::Workspace {
  std::vector<std::vector<char>> buffers_;
  void* allocate(size_t bytes) override { return buffers_.emplace_back(unwritten<char>(bytes)).data(); }
};

inline int failures = 0, comparisons = 0;

// The resolution of a result that was summed in the accumulation type of T and stored as Stored.
template <class T, class Stored = gcnet_ext::cuda::acc_t<T>>
double resolution() {
  const double summed = std::is_same_v<T, double> ? 1e-13 : 4e-6;
  const double stored = sizeof(Stored) == 8 ? 0 : sizeof(Stored) == 4 ? 1e-7 : std::is_same_v<Stored, Half> ? 1e-3 : 8e-3;
  return summed + stored;
}

// |found - expected| <= tolerance * (size + |expected|), element by element; NaN only where NaN is expected.
class Comparison {
 public:
  Comparison(std::string what, double tolerance, double size = 1)
      : what_(std::move(what)), tolerance_(tolerance), size_(size) {}
  Comparison(const Comparison&) = delete;
  ~Comparison() {
    comparisons++;
    if (worst_ <= tolerance_) return;
    failures++;
    std::printf("FAILED: %s: error %.3g, allowed %.3g, at element %lld\n", what_.c_str(), worst_, tolerance_,
                static_cast<long long>(at_));
  }
  void add(double found, double expected) {
    const double error = std::fabs(found - expected) / (size_ + std::fabs(expected));
    const bool same = found == expected || (std::isnan(found) && std::isnan(expected));
    if (!same && !(error <= worst_)) {
      worst_ = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
      at_ = count_;
    }
    count_++;
  }

 private:
  const std::string what_;
  const double tolerance_, size_;
  double worst_ = 0;
  int64_t at_ = 0, count_ = 0;
};

// The tests of each group of kernels, a file for each. `small`: only what ThreadSanitizer and the mutation check can afford.
void test_attention_pool(bool small);
void test_backward_tickets(bool small);
void test_channel_fuse(bool small);
void test_channel_sums(bool small);
void test_flat_stages(bool small);
void test_forward_tickets(bool small);
void test_global_context(bool small);
void test_global_response_norm(bool small);
void test_tickets(bool small);

}  // namespace kernel_test
