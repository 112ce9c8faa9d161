// fuse_rows and fuse_positions.
#include "../../../csrc/cuda/channel_fuse_launch.h"
#include "kernel_test.h"

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

struct Given {
  bool x = true, scale = true, shift = true;

  std::string text() const {
    return std::string(x ? "" : ", no x") + (scale ? "" : ", no scale") + (shift ? "" : ", no shift");
  }
};

template <class T>
void test(const Shape& shape, const Given& given = {}) {
  using A = acc_t<T>;
  const auto x = FeatureMap<T>::random(shape);
  auto out = FeatureMap<T>::empty({shape.samples, shape.channels, shape.positions, shape.channels_last});
  const auto scale = random_values<T>(shape.samples * shape.channels), shift = random_values<T>(shape.samples * shape.channels);
  FuseParams<T> params{};
  if (given.x) params.x = x.read();
  params.out = out.write();
  params.extent = shape.extent();
  if (given.scale) params.scale = parameter(scale);
  if (given.shift) params.shift = parameter(shift);
  params.shift_factor = A(0.5);
  launch_channel_fuse(params, nullptr);

  Comparison comparison(std::string("channel_fuse ") + kName<T> + " " + shape.text() + given.text(), resolution<T, T>());
  for (int64_t n = 0; n < shape.samples; n++) {
    for (int64_t c = 0; c < shape.channels; c++) {
      const int64_t row = n * shape.channels + c;
      const double factor = given.scale ? static_cast<double>(scale[row]) : 1;
      const double offset = given.shift ? 0.5 * static_cast<double>(shift[row]) : 0;
      for (int64_t p = 0; p < shape.positions; p++) {
        comparison.add(out.at(n, c, p), (given.x ? x.at(n, c, p) * factor : 0) + offset);
      }
    }
  }
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
  for (const bool channels_last : {false, true}) test<float>({2, 33, 50, channels_last});
}

}  // namespace kernel_test
