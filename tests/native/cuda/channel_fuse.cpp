// fuse_rows and fuse_positions; fuse_elements, the bits of its ReLU, and the way back through that.
#include "../../../csrc/cuda/channel_fuse.cuh"
#include "kernel_test.h"

namespace gcnet_ext::cuda {
GCNET_EXT_COMPILED_HERE(launch_channel_fuse)
GCNET_EXT_COMPILED_HERE(launch_fuse_elements)
GCNET_EXT_COMPILED_HERE(launch_positive_bits)
GCNET_EXT_COMPILED_HERE(launch_relu_backward)
}  // namespace gcnet_ext::cuda

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

// The operands that a fusion has.
struct Operands {
  bool x = true, scale = true, shift = true;

  std::string text() const {
    return std::string(x ? "" : ", no x") + (scale ? "" : ", no scale") + (shift ? "" : ", no shift");
  }
};

template <class T>
void test(const Shape& shape, const Operands& has = {}) {
  using A = acc_t<T>;
  const auto x = FeatureMap<T>::random(shape);
  auto out = FeatureMap<T>::empty({shape.samples, shape.channels, shape.positions, shape.channels_last});
  const auto scale = random_values<T>(shape.samples * shape.channels), shift = random_values<T>(shape.samples * shape.channels);
  FuseParams<T> params{};
  if (has.x) params.x = x.read();
  params.out = out.write();
  params.extent = shape.extent();
  if (has.scale) params.scale = parameter(scale);
  if (has.shift) params.shift = parameter(shift);
  params.shift_factor = A(0.5);
  launch_channel_fuse(params, nullptr);

  Comparison comparison(std::string("channel_fuse ") + kName<T> + " " + shape.text() + has.text(), resolution<T, T>());
  for (int64_t n = 0; n < shape.samples; n++) {
    for (int64_t c = 0; c < shape.channels; c++) {
      const int64_t row = n * shape.channels + c;
      const double factor = has.scale ? static_cast<double>(scale[row]) : 1;
      const double offset = has.shift ? 0.5 * static_cast<double>(shift[row]) : 0;
      for (int64_t p = 0; p < shape.positions; p++) {
        comparison.add(out.at(n, c, p), (has.x ? x.at(n, c, p) * factor : 0) + offset);
      }
    }
  }
}

template <class T>
void test_relu(const Shape& shape, bool has_residual) {
  const Shape dense{shape.samples, shape.channels, shape.positions, shape.channels_last};
  auto x = FeatureMap<T>::random(shape);
  const auto residual = FeatureMap<T>::random(dense), grad = FeatureMap<T>::random(shape);
  auto out = FeatureMap<T>::empty(dense), grad_x = FeatureMap<T>::empty(dense);
  x.values[shape.offset] = std::numeric_limits<T>::quiet_NaN();
  const auto scale = random_values<T>(shape.samples * shape.channels), shift = random_values<T>(shape.samples * shape.channels);
  auto bits = unwritten<uint8_t>(bytes_of_bits(shape));
  Fusion<T> params;
  params.x = x.read();
  params.out = out.write();
  params.extent = shape.extent();
  params.scale = parameter(scale);
  params.shift = parameter(shift);
  if (has_residual) params.residual = residual.read();
  params.relu = true;
  launch_fuse_elements(params, nullptr);
  launch_positive_bits(out.read(), shape.extent(), bits.data(), nullptr);
  launch_relu_backward(grad.read(), grad_x.write(), shape.extent(), bits.data(), nullptr);

  const std::string name = std::string("final relu ") + kName<T> + " " + shape.text() + (has_residual ? " residual" : "");
  Comparison results(name + ", out", resolution<T, T>()), gradients(name + ", grad", 0), of_bits(name + ", bits", 0);
  std::vector<uint8_t> wanted(bits.size());
  const int64_t rows = shape.channels_last ? shape.positions : shape.channels,
                row_bytes = bytes_of_bits(shape) / shape.samples / rows;
  for (int64_t n = 0; n < shape.samples; n++) {
    for (int64_t c = 0; c < shape.channels; c++) {
      const int64_t row = n * shape.channels + c;
      for (int64_t p = 0; p < shape.positions; p++) {
        const double value = x.at(n, c, p) * static_cast<double>(scale[row]) + static_cast<double>(shift[row]) +
                             (has_residual ? residual.at(n, c, p) : 0);
        results.add(out.at(n, c, p), value < 0 ? 0 : value);
        const bool positive = !(out.at(n, c, p) <= 0);
        gradients.add(grad_x.at(n, c, p), positive ? grad.at(n, c, p) : 0);
        const int64_t in_row = shape.channels_last ? c : p;
        wanted[(n * rows + (shape.channels_last ? p : c)) * row_bytes + in_row / 8] |= positive << in_row % 8;
      }
    }
  }
  for (size_t i = 0; i < bits.size(); i++) of_bits.add(bits[i], wanted[i]);
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
    for (const bool residual : {false, true}) {
      test_relu<T>({1, 1, 1, channels_last}, residual);
      test_relu<T>({3, 20, 49, channels_last, 1, 5}, residual);
      test_relu<T>({2, 300, 9, channels_last}, residual);
    }
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
    test_relu<float>({2, 33, 50, channels_last}, /*has_residual=*/true);
  }
}

}  // namespace kernel_test
