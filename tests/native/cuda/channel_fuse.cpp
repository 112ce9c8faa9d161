// The fusion by every kernel that has its operands, the bits of its ReLU, and the way back through that.
#include "../../../csrc/cuda/channel_fuse.cuh"
#include "kernel_test.h"

namespace gcnet_ext::cuda {
GCNET_EXT_COMPILED_HERE(launch_channel_fuse)
GCNET_EXT_COMPILED_HERE(launch_fuse_elements)
GCNET_EXT_COMPILED_HERE(launch_fuse_items)
GCNET_EXT_COMPILED_HERE(launch_positive_bits)
GCNET_EXT_COMPILED_HERE(launch_relu_backward)
}  // namespace gcnet_ext::cuda

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

// The operands that a fusion has.
struct Operands {
  bool x = true, scale = true, shift = true, residual = false, relu = false, valid = false, in_place = false;

  std::string text() const {
    return std::string(x ? "" : ", no x") + (scale ? "" : ", no scale") + (shift ? "" : ", no shift") +
           (residual ? ", residual" : "") + (relu ? ", relu" : "") + (valid ? ", valid" : "") + (in_place ? ", in place" : "");
  }
};

// The number of the byte of an element's bit.
int64_t byte_of(const Shape& shape, int64_t n, int64_t c, int64_t p) {
  const int64_t rows = shape.channels_last ? shape.positions : shape.channels, row = shape.channels_last ? p : c;
  return (n * rows + row) * (bytes_of_bits(shape) / shape.samples / rows) + (shape.channels_last ? c : p) / 8;
}

template <class T>
void test_once(const Shape& shape, const Operands& has, const std::string& how) {
  using A = acc_t<T>;
  const Shape dense{shape.samples, shape.channels, shape.positions, shape.channels_last};
  auto x = FeatureMap<T>::random(shape);
  const auto residual = FeatureMap<T>::random(shape), grad = FeatureMap<T>::random(shape);
  if (has.relu) *x.write().at(0, 0, 0) = std::numeric_limits<T>::quiet_NaN();
  const FeatureMap<T> given = x;
  auto new_map = FeatureMap<T>::empty(dense), grad_x = FeatureMap<T>::empty(dense);
  FeatureMap<T>& out = has.in_place ? x : new_map;
  const auto scale = random_values<T>(shape.samples * shape.channels), shift = random_values<T>(shape.samples * shape.channels);
  const std::vector<uint8_t> valid = random_valid(shape.samples, shape.positions);
  auto bits = unwritten<uint8_t>(bytes_of_bits(shape));
  TestWorkspace workspace;
  Fusion<T> fusion;
  if (has.x) fusion.x = x.read();
  fusion.out = out.write();
  fusion.extent = shape.extent();
  if (has.scale) fusion.scale = parameter(scale);
  if (has.shift) fusion.shift = parameter(shift);
  fusion.shift_factor = A(0.5);
  if (has.residual) fusion.residual = residual.read();
  fusion.relu = has.relu;
  if (has.valid) fusion.valid = with_shares<T>({valid.data(), shape.positions}, shape.extent(), workspace, nullptr);
  if (has.relu) fusion.positive = bits.data();
  channel_fuse(fusion, nullptr);
  if (has.relu) launch_relu_backward(grad.read(), grad_x.write(), shape.extent(), bits.data(), nullptr);

  const std::string name = std::string("channel_fuse ") + kName<T> + " " + shape.text() + has.text() + how;
  Comparison results(name, resolution<T, T>()), gradients(name + ", grad", 0), of_bits(name + ", bits", 0);
  std::vector<uint8_t> wanted(bits.size());
  for (int64_t n = 0; n < shape.samples; n++) {
    const int64_t count = std::count(&valid[n * shape.positions], &valid[n * shape.positions] + shape.positions, 1);
    for (int64_t c = 0; c < shape.channels; c++) {
      const int64_t row = n * shape.channels + c;
      const double factor = has.scale ? static_cast<double>(scale[row]) : 1;
      const double offset = has.shift ? 0.5 * static_cast<double>(shift[row]) : 0;
      for (int64_t p = 0; p < shape.positions; p++) {
        const double share = !has.valid ? 1 : valid[n * shape.positions + p] ? 1. / count : 0;
        const double value =
            (has.x ? given.at(n, c, p) * factor : 0) + offset * share + (has.residual ? residual.at(n, c, p) : 0);
        results.add(out.at(n, c, p), has.relu && value < 0 ? 0 : value);
        if (!has.relu) continue;
        const bool positive = !(out.at(n, c, p) <= 0);
        gradients.add(grad_x.at(n, c, p), positive ? grad.at(n, c, p) : 0);
        wanted[byte_of(shape, n, c, p)] |= positive << (shape.channels_last ? c : p) % 8;
      }
    }
  }
  for (size_t i = 0; i < bits.size() && has.relu; i++) of_bits.add(bits[i], wanted[i]);
}

template <class T>
void test(const Shape& shape, const Operands& has = {}) {
  test_once<T>(shape, has, "");
  tuning().engine = 2;
  for (const char* multiprocessors : {"1", "3"}) {
    setenv("GCNET_EMULATION_MULTIPROCESSORS", multiprocessors, /*overwrite=*/1);
    test_once<T>(shape, has, std::string(", engine 2 on ") + multiprocessors);
  }
  tuning().engine = 0;
}

// Every operand with and without the others.
template <class T>
void test_operands(const Shape& shape) {
  for (int choice = 0; choice < 16; choice++) {
    const bool residual = choice & 1, relu = choice & 2, valid = choice & 4, in_place = choice & 8 && shape.gap == 0;
    test<T>(shape, {true, choice % 3 != 0, choice % 3 != 1, residual, relu, valid, in_place});
  }
}

// By items, x and the residual are loaded once, and the result and its bits are stored once.
void test_traffic([[maybe_unused]] bool channels_last) {
#if !defined(__SANITIZE_THREAD__)  // see count_accesses
  const Shape shape{2, 40, 120, channels_last};
  const auto x = FeatureMap<float>::random(shape), residual = FeatureMap<float>::random(shape);
  auto out = FeatureMap<float>::empty(shape);
  auto bits = unwritten<uint8_t>(bytes_of_bits(shape));
  Fusion<float> fusion;
  fusion.x = x.read();
  fusion.out = out.write();
  fusion.extent = shape.extent();
  fusion.residual = residual.read();
  fusion.relu = true;
  fusion.positive = bits.data();
  tuning().engine = 2;
  emulation::count_accesses(true);
  channel_fuse(fusion, nullptr);
  Comparison comparison(std::string("traffic of channel_fuse") + (channels_last ? " channels_last" : ""), 0);
  const auto add = [&](const auto& values, unsigned loads, unsigned stores) {
    const auto found = emulation::traffic_of(values.data(), values.size() * sizeof(values[0]));
    for (const unsigned count : {found.least_loads, found.most_loads}) comparison.add(count, loads);
    for (const unsigned count : {found.least_stores, found.most_stores}) comparison.add(count, stores);
  };
  add(x.values, 1, 0);
  add(residual.values, 1, 0);
  add(out.values, 0, 1);
  add(bits, 0, 1);
  emulation::count_accesses(false);
  tuning().engine = 0;
#endif
}

template <class T>
void test_dtype() {
  for (const bool channels_last : {false, true}) {
    test<T>({1, 1, 1, channels_last});
    test<T>({3, 1, 49, channels_last});
    test<T>({3, 5, 7, channels_last});
    test<T>({2, 16, 24, channels_last, 1});
    test<T>({3, 33, 50, channels_last, 0, 8});
    test<T>({2, 3, 5001, channels_last});
    test<T>({1, 8, 9000, channels_last});
    test<T>({2, 300, 9, channels_last});
    test<T>({1, 2600, 3, channels_last});
    for (const bool scale : {false, true}) test<T>({2, 16, 24, channels_last}, {true, scale, !scale});
    test<T>({2, 16, 24, channels_last}, {false, false, true});
    test<T>({2, 16, 24, channels_last}, {false, true, true, true, true});
    for (const bool residual : {false, true}) {
      test<T>({1, 1, 1, channels_last}, {true, true, true, residual, true});
      test<T>({3, 20, 49, channels_last, 1, 5}, {true, true, true, residual, true});
      test<T>({2, 300, 9, channels_last}, {true, true, true, residual, true});
    }
    test_operands<T>({3, 24, 56, channels_last, 0, 16});
    test_operands<T>({2, 8, 49, channels_last});
    test_operands<T>({1, 16, 200, channels_last});
    test<T>({2, 48, 400, channels_last}, {true, true, true, true, true, true});
    test<T>({1, 1032, 17, channels_last}, {true, true, true, true, true, true});
  }
}

}  // namespace

void test_channel_fuse(bool small) {
  if (!small) {
    test_dtype<double>();
    test_dtype<BFloat16>();
    test_dtype<Half>();
    test_dtype<float>();
  }
  for (const bool channels_last : {false, true}) {
    test<float>({2, 33, 50, channels_last});
    test<float>({2, 33, 50, channels_last}, {true, true, true, /*residual=*/true, /*relu=*/true});
    test<float>({2, 40, 120, channels_last}, {true, true, true, true, true, true, /*in_place=*/true});
    test<float>({2, 40, 121, channels_last}, {true, true, true, true, true});
    test_traffic(channels_last);
  }
}

}  // namespace kernel_test
