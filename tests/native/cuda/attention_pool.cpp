// Attention pooling and its backward pass on every path, in both engines, without the transform in the tail, and where not all
// positions count.
#include "../../../csrc/cuda/attention_pool_backward.cuh"
#include "kernel_test.h"

namespace gcnet_ext::cuda {
GCNET_EXT_COMPILED_HERE(launch_attention_pool)
GCNET_EXT_COMPILED_HERE(launch_attention_pool_backward)
GCNET_EXT_COMPILED_HERE(with_shares)
GCNET_EXT_COMPILED_HERE(launch_average_valid)
}  // namespace gcnet_ext::cuda

namespace kernel_test {
namespace {

using namespace gcnet_ext;
using namespace gcnet_ext::cuda;

struct Expected {
  std::vector<double> context, attention;
};

template <class T>
Expected expected(const FeatureMap<T>& x, const std::vector<T>& weight, double bias, const std::vector<uint8_t>& valid) {
  const auto [samples, channels, positions] = std::tuple(x.shape.samples, x.shape.channels, x.shape.positions);
  Expected result{std::vector<double>(samples * channels), std::vector<double>(samples * positions)};
  for (int64_t n = 0; n < samples; n++) {
    double* attention = &result.attention[n * positions];
    const auto counts = [&, n = n, positions = positions](int64_t p) { return valid.empty() || valid[n * positions + p]; };
    double maximum = -INFINITY, sum = 0;
    for (int64_t p = 0; p < positions; p++) {
      if (!counts(p)) continue;
      attention[p] = bias;
      for (int64_t c = 0; c < channels; c++) attention[p] += static_cast<double>(weight[c]) * x.at(n, c, p);
      maximum = std::fmax(maximum, attention[p]);
    }
    for (int64_t p = 0; p < positions; p++) sum += attention[p] = counts(p) ? std::exp(attention[p] - maximum) : 0;
    for (int64_t p = 0; p < positions; p++) {
      if (!counts(p)) continue;
      attention[p] /= sum;
      for (int64_t c = 0; c < channels; c++) result.context[n * channels + c] += attention[p] * x.at(n, c, p);
    }
  }
  return result;
}

template <class T>
void test_once(const Shape& shape, int64_t tiles_per_split, bool all_count) {
  using A = acc_t<T>;
  auto x = FeatureMap<T>::random(shape);
  const std::vector<uint8_t> valid = all_count ? std::vector<uint8_t>() : random_valid(shape.samples, shape.positions);
  forget(x, valid);
  if (!all_count && shape.samples > 2) *x.write().at(0, 0, 0) = std::numeric_limits<T>::quiet_NaN();  // at one that counts
  const auto weight = random_values<T>(shape.channels, 3 / std::sqrt(static_cast<double>(shape.channels))),
             bias = random_values<T>(1);
  TestWorkspace workspace;
  const Valid<T> of_samples =
      with_shares<T>({all_count ? nullptr : valid.data(), shape.positions}, shape.extent(), workspace, nullptr);
  CudaPoolPlan plan = pool_plan(shape.extent(), x.read(), of_samples);
  const bool flat = plan.path == CudaPoolPath::flat;
  if (tiles_per_split && !flat) {  // gives a split more tiles than the plan gives it for so few positions
    plan.tiles_per_split = tiles_per_split;
    plan.splits = (shape.positions + plan.tile_positions * tiles_per_split - 1) / (plan.tile_positions * tiles_per_split);
  }
  auto context = unwritten<A>(shape.samples * shape.channels), attention = unwritten<A>(shape.samples * shape.positions);
  auto partial = unwritten<A>(pool_partials<T>(plan, shape.extent()));
  std::vector<unsigned> arrived(shape.samples, 0);

  PoolParams<T> params{};
  params.x = x.read();
  params.extent = shape.extent();
  params.weight = parameter(weight);
  params.bias = parameter(bias);
  params.context = context.data();
  params.attention = attention.data();
  params.partial = partial.data();
  if (!plan.by_items() && !flat) params.arrived = arrived.data();
  params.valid = of_samples;
  params.splits = static_cast<unsigned>(plan.splits);
  launch_attention_pool(params, plan, nullptr);
  if (plan.by_items()) launch_attention_pool_merge(params, nullptr);

  const Expected wanted = expected(x, weight, static_cast<double>(bias[0]), valid);
  const std::string name = std::string("attention_pool ") + kName<T> + " " + shape.text() + " splits " +
                           std::to_string(plan.splits) + (plan.by_items() ? " by items" : "") + (flat ? " flat" : "") +
                           (all_count ? "" : " valid");
  Comparison contexts(name + ", context", resolution<T>() * 10),
      attentions(name + ", attention", resolution<T>() * 10, 1. / shape.positions);
  for (size_t i = 0; i < context.size(); i++) contexts.add(context[i], wanted.context[i]);
  for (size_t i = 0; i < attention.size(); i++) attentions.add(attention[i], wanted.attention[i]);
}

template <class T>
void test(const Shape& shape, int64_t tiles_per_split = 0, bool all_count = true) {
  tuning().engine = 1;
  test_once<T>(shape, tiles_per_split, all_count);
  tuning().engine = 2;
  for (const char* multiprocessors : {"1", "3"}) {
    setenv("GCNET_EMULATION_MULTIPROCESSORS", multiprocessors, /*overwrite=*/1);
    test_once<T>(shape, tiles_per_split, all_count);
  }
  tuning().engine = 0;
}

struct BackwardOptions {
  bool attends = true, valid = true;
  bool fused = false;  // with a gradient of the fusion, and a scale
  bool relu = false;   // that gradient is masked; in the second engine alone
};

// The backward pass. Where not all positions count, the gradient of the first context is infinite.
template <class T>
void test_backward_once(const Shape& shape, const BackwardOptions& options) {
  using A = acc_t<T>;
  const auto [samples, channels, positions] = std::tuple(shape.samples, shape.channels, shape.positions);
  auto x = FeatureMap<T>::random(shape);
  const auto grad = FeatureMap<T>::random(shape);
  auto grad_x = FeatureMap<T>::empty({samples, channels, positions, shape.channels_last});
  const std::vector<uint8_t> valid = options.valid ? random_valid(samples, positions) : std::vector<uint8_t>();
  forget(x, valid);
  const auto weight = random_values<T>(channels, 3 / std::sqrt(static_cast<double>(channels)));
  const auto scale = random_values<A>(samples * channels);
  const Expected forward = expected(x, weight, 0, valid);
  const std::vector<A> context(forward.context.begin(), forward.context.end()),
      attention(forward.attention.begin(), forward.attention.end());
  auto grad_context = random_values<A>(samples * channels);
  if (options.valid) grad_context[0] = std::numeric_limits<A>::infinity();
  std::vector<uint8_t> bits(options.relu ? bytes_of_bits(shape) : 0);
  for (uint8_t& byte : bits) byte = static_cast<uint8_t>(random_number() * 128 + 128);
  const RowsOfSample bit_rows(shape.extent());
  const auto grad_at = [&](int64_t n, int64_t c, int64_t p) {
    const int64_t row = n * bit_rows.rows + (shape.channels_last ? p : c), column = shape.channels_last ? c : p;
    const bool passes = !options.relu || (bits[row * bit_rows.bytes() + column / 8] >> column % 8 & 1) != 0;
    return options.fused && passes ? grad.at(n, c, p) : 0;
  };
  auto grad_weight = unwritten<T>(channels);
  TestWorkspace workspace;
  PoolBackwardParams<T> params;
  params.x = x.read();
  if (options.fused) params.grad = grad.read();
  params.grad_x = grad_x.write();
  params.extent = shape.extent();
  if (options.attends) params.weight = parameter(weight);
  if (options.fused) params.scale = scale.data();
  params.grad_context = grad_context.data();
  params.context = context.data();
  params.attention = attention.data();
  params.valid = {options.valid ? valid.data() : nullptr, positions};
  if (options.relu) params.positive = bits.data();
  const std::string plan = std::to_string(static_cast<int>(pool_backward_plan(params).path));
  if (options.relu && !pool_backward_plan(params).by_items()) return;
  GradientParams<T> gradients;
  const bool sums_weight = options.attends && !options.valid;
  attention_pool_backward(params, sums_weight ? MutableParameter<T>(grad_weight.data(), sizeof(T) == 4) : MutableParameter<T>(),
                          gradients, workspace, nullptr);
  launch_parameter_gradients(gradients, /*early=*/false, nullptr);

  const std::string name = std::string("attention_pool_backward ") + kName<T> + " " + shape.text() + " path " + plan +
                           (options.attends ? "" : " avg") + (options.valid ? " valid" : "") + (options.fused ? " fused" : "") +
                           (options.relu ? " relu" : "");
  Comparison comparison(name, resolution<T>() * 10 + resolution<T, T>());
  std::vector<double> expected_weight(channels);
  for (int64_t n = 0; n < samples; n++) {
    const int64_t count = options.valid ? std::count(&valid[n * positions], &valid[n * positions] + positions, 1) : positions;
    for (int64_t p = 0; p < positions; p++) {
      const bool counts = !options.valid || valid[n * positions + p];
      double grad_logit = 0;
      for (int64_t c = 0; c < channels && counts; c++) {
        grad_logit += grad_context[n * channels + c] * (x.at(n, c, p) - forward.context[n * channels + c]);
      }
      const double m = options.attends ? forward.attention[n * positions + p] : 1. / count;
      for (int64_t c = 0; c < channels; c++) {
        const double through_logit = options.attends ? m * grad_logit * static_cast<double>(weight[c]) : 0;
        expected_weight[c] += m * grad_logit * (x.at(n, c, p) - forward.context[n * channels + c]);
        if (options.valid && n == 0 && counts && options.attends) continue;  // infinite or NaN by the infinite gradient
        const double of_pool = counts ? m * grad_context[n * channels + c] + through_logit : 0;
        comparison.add(grad_x.at(n, c, p),
                       of_pool + grad_at(n, c, p) * static_cast<double>(options.fused ? scale[n * channels + c] : 1));
      }
    }
  }
  Comparison weights(name + ", weight", resolution<T>() * 100 + resolution<T, T>());
  for (int64_t c = 0; c < channels && sums_weight; c++) weights.add(static_cast<double>(grad_weight[c]), expected_weight[c]);
}

template <class T>
void test_backward(const Shape& shape, const BackwardOptions& options = {}) {
  tuning().engine = 1;
  if (!options.relu) test_backward_once<T>(shape, options);
  tuning().engine = 2;
  for (const char* multiprocessors : {"1", "3"}) {
    setenv("GCNET_EMULATION_MULTIPROCESSORS", multiprocessors, /*overwrite=*/1);
    test_backward_once<T>(shape, options);
  }
  tuning().engine = 0;
}

// In the second engine NCHW maps of fewer than 256 positions take the flat stages.
int64_t for_items(int64_t positions, bool channels_last) { return channels_last ? positions : positions + 256; }

template <class T>
void test_dtype() {
  for (const bool channels_last : {false, true}) {
    const auto items = [&](int64_t positions) { return for_items(positions, channels_last); };
    test<T>({1, 1, 1, channels_last});
    test<T>({3, 1, 49, channels_last});
    test<T>({2, 3, 50, channels_last});
    test<T>({2, 16, 48, channels_last, 1});
    test<T>({2, 48, 304, channels_last});
    test<T>({1, 48, 304, channels_last, 0, 8}, 2);
    test<T>({2, 300, 72, channels_last});
    test<T>({2, 20, 140, channels_last});
    test<T>({1, 600, 76, channels_last}, 2);
    test<T>({1, 301, 71, channels_last}, 2);
    test<T>({1, 1000, 40, channels_last});
    test<T>({1, 1100, 49, channels_last}, 2);
    test<T>({1, 2048, 24, channels_last});
    test<T>({1, 4100, 9, channels_last});
    test<T>({2, 20, 1, channels_last}, 0, /*all_count=*/false);
    test<T>({3, 20, 49, channels_last}, 0, /*all_count=*/false);
    test<T>({2, 300, 200, channels_last, 1, 7}, 2, /*all_count=*/false);
    test<T>({3, 304, items(72), channels_last, 0, 8}, 2, /*all_count=*/false);
    if (!channels_last) {
      test<T>({2, 300, 264, false});
      test<T>({1, 600, 328, false}, 2);
      test<T>({1, 1000, 256, false});
      test<T>({1, 2048, 256, false});
    }
    for (const bool attends : {false, true}) {
      test_backward<T>({3, 20, 49, channels_last}, {attends});
      test_backward<T>({3, 270, 70, channels_last, 1, 7}, {attends});
      test_backward<T>({3, 272, items(8), channels_last, 8, 16}, {attends, true, true});
    }
    test_backward<T>({3, 56, items(136), channels_last}, {true, true, true, true});
    test_backward<T>({2, 200, items(72), channels_last, 8, 16}, {true, false, true, true});
    test_backward<T>({2, 520, items(8), channels_last}, {true, false, true});
    test_backward<T>({1, 1000, items(24), channels_last}, {true, false, true, true});
    test_backward<T>({1, 1032, 24, channels_last}, {true, false, true, true});
    test_backward<T>({1, 2048, 24, channels_last}, {true, true, true});
  }
}

}  // namespace

void test_attention_pool(bool small) {
  if (!small) {
    test_dtype<double>();
    test_dtype<BFloat16>();
    test_dtype<Half>();
    test_dtype<float>();
  }
  for (const bool channels_last : {false, true}) {
    test<float>({1, 20, 200, channels_last});
    test<float>({2, 20, 264, channels_last}, 2);
    test<float>({1, 280, 264, channels_last}, 2);
    test<float>({1, 19, 50, channels_last});
    test<float>({3, 20, 300, channels_last}, 2, /*all_count=*/false);
    test<float>({1, 2100, 70, channels_last}, 2);
    test_backward<float>({2, 20, for_items(136, channels_last), channels_last}, {true, false, true, true});
    test_backward<float>({2, 132, for_items(72, channels_last), channels_last}, {true, true, true});
    test_backward<float>({2, 260, for_items(40, channels_last), channels_last}, {true, false});
  }
}

}  // namespace kernel_test
