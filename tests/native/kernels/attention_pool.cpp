// attention_pool_rows, _positions and _streamed, without the transform in their tail.
#include "../../../csrc/cuda/attention_pool_launch.h"
#include "kernel_test.h"

namespace kernel_test {
namespace {

using namespace gcnet_ext;
using namespace gcnet_ext::cuda;

struct Expected {
  std::vector<double> context, attention;
};

template <class T>
Expected expected(const FeatureMap<T>& x, const std::vector<T>& weight, double bias) {
  const auto [samples, channels, positions] = std::tuple(x.shape.samples, x.shape.channels, x.shape.positions);
  Expected result{std::vector<double>(samples * channels), std::vector<double>(samples * positions)};
  for (int64_t n = 0; n < samples; n++) {
    double* attention = &result.attention[n * positions];
    double maximum = -INFINITY, sum = 0;
    for (int64_t p = 0; p < positions; p++) {
      attention[p] = bias;
      for (int64_t c = 0; c < channels; c++) attention[p] += static_cast<double>(weight[c]) * x.at(n, c, p);
      maximum = std::fmax(maximum, attention[p]);
    }
    for (int64_t p = 0; p < positions; p++) sum += attention[p] = std::exp(attention[p] - maximum);
    for (int64_t p = 0; p < positions; p++) attention[p] /= sum;
    for (int64_t c = 0; c < channels; c++) {
      for (int64_t p = 0; p < positions; p++) result.context[n * channels + c] += attention[p] * x.at(n, c, p);
    }
  }
  return result;
}

template <class T>
void test(const Shape& shape, int64_t tiles_per_split = 0) {
  using A = acc_t<T>;
  const auto x = FeatureMap<T>::random(shape);
  const auto weight = random_values<T>(shape.channels, 3 / std::sqrt(static_cast<double>(shape.channels))),
             bias = random_values<T>(1);
  CudaMap map = cuda_map(shape.extent(), sizeof(T));
  map.aligned = aligned(map, x.read());
  CudaPoolPlan plan = plan_cuda_pool(map);
  if (tiles_per_split) {  // more tiles in a split than the plan gives to so few positions
    plan.tiles_per_split = tiles_per_split;
    plan.splits = (shape.positions + plan.tile_positions * tiles_per_split - 1) / (plan.tile_positions * tiles_per_split);
  }
  auto context = unwritten<A>(shape.samples * shape.channels), attention = unwritten<A>(shape.samples * shape.positions);
  auto partial = unwritten<A>(shape.samples * plan.splits * (shape.channels + 2));
  std::vector<unsigned> arrived(shape.samples, 0);

  PoolParams<T> params{};
  params.x = x.read();
  params.extent = shape.extent();
  params.weight = parameter(weight);
  params.bias = parameter(bias);
  params.context = context.data();
  params.attention = attention.data();
  params.partial = partial.data();
  params.arrived = arrived.data();
  launch_attention_pool(params, plan, nullptr);

  const Expected wanted = expected(x, weight, static_cast<double>(bias[0]));
  const std::string name =
      std::string("attention_pool ") + kName<T> + " " + shape.text() + " splits " + std::to_string(plan.splits);
  Comparison contexts(name + ", context", resolution<T>() * 10),
      attentions(name + ", attention", resolution<T>() * 10, 1. / shape.positions);
  for (size_t i = 0; i < context.size(); i++) contexts.add(context[i], wanted.context[i]);
  for (size_t i = 0; i < attention.size(); i++) attentions.add(attention[i], wanted.attention[i]);
}

template <class T>
void test_dtype() {
  for (const bool channels_last : {false, true}) {
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
    test<float>({1, 280, 40, channels_last}, 2);
    test<float>({1, 19, 50, channels_last});
    test<float>({1, 2100, 70, channels_last}, 2);
  }
}

}  // namespace kernel_test
