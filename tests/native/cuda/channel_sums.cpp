// sums_rows and sums_positions, with nothing after them.
#include "../../../csrc/cuda/channel_sums.cuh"
#include "kernel_test.h"

namespace gcnet_ext::cuda {
GCNET_EXT_COMPILED_HERE(launch_channel_sums)
}  // namespace gcnet_ext::cuda

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

template <class T>
void test(const Shape& shape, bool with_b, bool with_fused) {
  using A = acc_t<T>;
  const auto a = FeatureMap<T>::random(shape), b = FeatureMap<T>::random(shape);
  auto fused = FeatureMap<T>::empty({shape.samples, shape.channels, shape.positions, shape.channels_last});
  const int64_t rows = shape.samples * shape.channels;
  const auto scale = random_values<T>(rows);
  auto sum_a = unwritten<A>(rows), sum_ab = unwritten<A>(rows);
  SumsParams<T> params{};
  params.a = a.read();
  if (with_b) params.b = b.read();
  if (with_fused) params.fused = fused.write();
  params.scale = parameter(scale);
  params.extent = shape.extent();
  params.sum_a = MutableParameter<T>(sum_a.data());
  if (with_b) params.sum_ab = MutableParameter<T>(sum_ab.data());
  params.factor = A(2);
  TestWorkspace workspace;
  launch_channel_sums(params, workspace, nullptr);

  const std::string name =
      std::string("channel_sums ") + kName<T> + " " + shape.text() + (with_b ? " b" : "") + (with_fused ? " fused" : "");
  const double size = std::sqrt(static_cast<double>(shape.positions));
  Comparison sums_a(name + ", sum_a", resolution<T>(), size), sums_ab(name + ", sum_ab", resolution<T>(), size);
  Comparison products(name + ", fused", resolution<T, T>());
  for (int64_t n = 0; n < shape.samples; n++) {
    for (int64_t c = 0; c < shape.channels; c++) {
      const int64_t row = n * shape.channels + c;
      double expected_a = 0, expected_ab = 0;
      for (int64_t p = 0; p < shape.positions; p++) {
        expected_a += a.at(n, c, p);
        expected_ab += a.at(n, c, p) * b.at(n, c, p);
        if (with_fused) products.add(fused.at(n, c, p), a.at(n, c, p) * static_cast<double>(scale[row]));
      }
      sums_a.add(sum_a[row], 2 * expected_a);
      if (with_b) sums_ab.add(sum_ab[row], expected_ab);
    }
  }
}

template <class T>
void test_dtype() {
  for (const bool channels_last : {false, true}) {
    test<T>({1, 1, 1, channels_last}, true, true);
    test<T>({3, 1, 49, channels_last}, true, true);
    test<T>({3, 5, 7, channels_last}, true, false);
    test<T>({2, 16, 72, channels_last, 1}, true, true);
    test<T>({3, 33, 50, channels_last, 0, 8}, false, true);
    test<T>({2, 3, 5001, channels_last}, true, true);
    test<T>({1, 8, 4800, channels_last}, false, false);
    test<T>({2, 300, 9, channels_last}, true, true);
    test<T>({3, 12, 700, channels_last}, true, true);
    test<T>({1, 2600, 3, channels_last}, true, false);
  }
}

}  // namespace

void test_channel_sums(bool small) {
  if (!small) {
    test_dtype<double>();
    test_dtype<BFloat16>();
    test_dtype<Half>();
    test_dtype<float>();
  }
  test<float>({1, 3, 1040, false}, true, true);
  test<float>({1, 5, 320, true}, true, false);
  test<float>({2, 1100, 40, true}, true, true);
}

}  // namespace kernel_test
