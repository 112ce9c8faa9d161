// sums_rows and sums_positions, and sums_items in the second engine, with nothing after them.
#include "../../../csrc/cuda/channel_sums.cuh"
#include "kernel_test.h"

namespace gcnet_ext::cuda {
GCNET_EXT_COMPILED_HERE(launch_channel_sums)
}  // namespace gcnet_ext::cuda

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

struct Options {
  bool with_b = true, with_fused = false;
  bool relu = false, valid = false;  // of the second engine alone: a is masked
};

template <class T>
void test_once(const Shape& shape, const Options& options, int64_t engine) {
  using A = acc_t<T>;
  auto a = FeatureMap<T>::random(shape);
  const auto b = FeatureMap<T>::random(shape);
  auto fused = FeatureMap<T>::empty({shape.samples, shape.channels, shape.positions, shape.channels_last});
  const int64_t rows = shape.samples * shape.channels;
  const auto scale = random_values<T>(rows);
  auto sum_a = unwritten<A>(rows), sum_ab = unwritten<A>(rows);
  const auto valid = options.valid ? random_valid(shape.samples, shape.positions) : std::vector<uint8_t>();
  forget(a, valid);
  std::vector<uint8_t> bits(options.relu ? bytes_of_bits(shape) : 0);
  for (uint8_t& byte : bits) byte = static_cast<uint8_t>(random_number() * 128 + 128);
  const RowsOfSample bit_rows(shape.extent());
  const auto counts = [&](int64_t n, int64_t c, int64_t p) {
    if (options.valid && !valid[n * shape.positions + p]) return false;
    const int64_t row = n * bit_rows.rows + (shape.channels_last ? p : c), column = shape.channels_last ? c : p;
    return !options.relu || (bits[row * bit_rows.bytes() + column / 8] >> column % 8 & 1) != 0;
  };
  TestWorkspace workspace;
  SumsParams<T> params{};
  params.a = a.read();
  if (options.with_b) params.b = b.read();
  if (options.with_fused) params.fused = fused.write();
  const bool scaled = engine != 2;  // the sums by items have no scale
  if (scaled) params.scale = parameter(scale);
  params.extent = shape.extent();
  params.sum_a = MutableParameter<T>(sum_a.data());
  if (options.with_b) params.sum_ab = MutableParameter<T>(sum_ab.data());
  params.factor = A(2);
  if (options.relu) params.positive = bits.data();
  params.valid = with_shares<T>({options.valid ? valid.data() : nullptr, shape.positions}, shape.extent(), workspace, nullptr);
  if ((options.relu || options.valid) && !sums_by_items(params)) return;
  launch_channel_sums(params, workspace, nullptr);

  const std::string name = std::string("channel_sums ") + kName<T> + " " + shape.text() + (options.with_b ? " b" : "") +
                           (options.with_fused ? " fused" : "") + (options.relu ? " relu" : "") +
                           (options.valid ? " valid" : "") + " engine " + std::to_string(engine);
  const double size = std::sqrt(static_cast<double>(shape.positions));
  Comparison sums_a(name + ", sum_a", resolution<T>(), size), sums_ab(name + ", sum_ab", resolution<T>(), size);
  Comparison products(name + ", fused", resolution<T, T>());
  for (int64_t n = 0; n < shape.samples; n++) {
    const int64_t count =
        options.valid ? std::count(&valid[n * shape.positions], &valid[n * shape.positions] + shape.positions, 1) : 1;
    for (int64_t c = 0; c < shape.channels; c++) {
      const int64_t row = n * shape.channels + c;
      double expected_a = 0, expected_ab = 0;
      for (int64_t p = 0; p < shape.positions; p++) {
        const double value = counts(n, c, p) ? a.at(n, c, p) : 0;
        expected_a += value;
        expected_ab += value * b.at(n, c, p);
        if (options.with_fused) products.add(fused.at(n, c, p), value * (scaled ? static_cast<double>(scale[row]) : 1));
      }
      sums_a.add(sum_a[row], 2 * expected_a / std::max<int64_t>(count, 1));
      if (options.with_b) sums_ab.add(sum_ab[row], expected_ab);
    }
  }
}

template <class T>
void test(const Shape& shape, const Options& options = {}) {
  tuning().engine = 1;
  if (!options.relu && !options.valid) test_once<T>(shape, options, 1);
  tuning().engine = 2;
  for (const char* multiprocessors : {"1", "4"}) {
    setenv("GCNET_EMULATION_MULTIPROCESSORS", multiprocessors, /*overwrite=*/1);
    test_once<T>(shape, options, 2);
  }
  tuning().engine = 0;
}

template <class T>
void test_dtype() {
  for (const bool channels_last : {false, true}) {
    test<T>({1, 1, 1, channels_last}, {true, true});
    test<T>({3, 1, 49, channels_last}, {true, true});
    test<T>({3, 5, 7, channels_last});
    test<T>({2, 16, 72, channels_last, 1}, {true, true});
    test<T>({3, 33, 50, channels_last, 0, 8}, {false, true});
    test<T>({2, 3, 5001, channels_last}, {true, true});
    test<T>({1, 8, 4800, channels_last}, {false, false});
    test<T>({2, 300, 9, channels_last}, {true, true});
    test<T>({3, 12, 700, channels_last}, {true, true});
    test<T>({1, 2600, 3, channels_last});
    test<T>({3, 136, 392, channels_last, 8, 16}, {true, true, true});
    test<T>({3, 24, 104, channels_last}, {true, false, true});
    test<T>({2, 16, 9600, channels_last}, {false, false, false, true});
    test<T>({3, 200, 48, channels_last}, {false, false, false, true});
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
  test<float>({1, 3, 1040, false}, {true, true});
  test<float>({1, 5, 320, true});
  test<float>({2, 1100, 40, true}, {true, true});
  test<float>({2, 5, 3000, false}, {true, true, true});
  test<float>({2, 40, 72, false});
  test<float>({1, 68, 400, true}, {false, false, false, true});
}

}  // namespace kernel_test
