// The stages for short or odd rows (csrc/cuda/flat_rows.cuh): attention pooling and its backward pass, and the sums over the
// positions, on several numbers of multiprocessors, which change what a block does but no bit.
#include "../../../csrc/cuda/attention_pool_backward.cuh"
#include "kernel_test.h"

namespace kernel_test {
namespace {

using namespace gcnet_ext;
using namespace gcnet_ext::cuda;

using Values = std::vector<double>;

struct Case {
  Shape shape;
  bool valid = false, grad = true, grad_x = true, grad_weight = true, scale = true;

  std::string text() const {
    return shape.text() + (valid ? " valid" : "") + (grad ? "" : " no g") + (grad_x ? "" : " no dx") +
           (grad_weight ? "" : " no dw") + (scale ? "" : " no s");
  }
};

// What a call computes, in the order of the fields.
template <class T>
struct Results {
  std::vector<acc_t<T>> context, attention;
  FeatureMap<T> grad_x;
  std::vector<acc_t<T>> grad_weight, sum_g, sum_gx;

  bool operator==(const Results& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
    };
    return same(context, other.context) && same(attention, other.attention) && same(grad_x.values, other.grad_x.values) &&
           same(grad_weight, other.grad_weight) && same(sum_g, other.sum_g) && same(sum_gx, other.sum_gx);
  }
};

template <class T>
struct Inputs {
  FeatureMap<T> x, grad;
  std::vector<uint8_t> valid;
  std::vector<T> weight, bias;
  std::vector<acc_t<T>> scale, grad_context;

  explicit Inputs(const Case& of)
      : x(FeatureMap<T>::random(of.shape)),
        grad(FeatureMap<T>::random(of.shape)),
        weight(random_values<T>(of.shape.channels, 3 / std::sqrt(static_cast<double>(of.shape.channels)))),
        bias(random_values<T>(1)),
        scale(random_values<acc_t<T>>(of.shape.samples * of.shape.channels)),
        grad_context(random_values<acc_t<T>>(of.shape.samples * of.shape.channels)) {
    if (of.valid) valid = random_valid(of.shape.samples, of.shape.positions);
    forget(x, valid);
  }
  bool counts(int64_t n, int64_t p) const { return valid.empty() || valid[n * x.shape.positions + p]; }
};

// Everything once with the current tuning, on so many multiprocessors.
template <class T>
Results<T> run(const Case& of, const Inputs<T>& in, int multiprocessors) {
  using A = acc_t<T>;
  setenv("GCNET_EMULATION_MULTIPROCESSORS", std::to_string(multiprocessors).c_str(), /*overwrite=*/1);
  const Shape& shape = of.shape;
  const int64_t rows = shape.samples * shape.channels;
  Results<T> results{unwritten<A>(rows),          unwritten<A>(shape.samples * shape.positions),
                     FeatureMap<T>::empty(shape), unwritten<A>(of.grad_weight ? shape.channels : 0),
                     unwritten<A>(rows),          unwritten<A>(rows)};
  TestWorkspace workspace;
  PoolParams<T> pool;
  pool.x = in.x.read();
  pool.extent = shape.extent();
  pool.weight = parameter(in.weight);
  pool.bias = parameter(in.bias);
  pool.context = results.context.data();
  pool.attention = results.attention.data();
  if (of.valid) pool.valid = {in.valid.data(), shape.positions};
  attention_pool(pool, workspace, nullptr);

  PoolBackwardParams<T> backward;
  backward.x = in.x.read();
  if (of.grad) backward.grad = in.grad.read();
  if (of.grad_x) backward.grad_x = results.grad_x.write();
  backward.extent = shape.extent();
  backward.weight = parameter(in.weight);
  if (of.scale) backward.scale = in.scale.data();
  backward.grad_context = in.grad_context.data();
  backward.context = results.context.data();
  backward.attention = results.attention.data();
  if (of.valid) backward.valid = {in.valid.data(), shape.positions};
  GradientParams<T> gradients;
  MutableParameter<T> grad_weight;
  if (of.grad_weight) grad_weight = MutableParameter<T>(results.grad_weight.data());
  attention_pool_backward(backward, grad_weight, gradients, workspace, nullptr);
  launch_parameter_gradients(gradients, /*early=*/false, nullptr);

  SumsParams<T> sums;
  sums.a = in.grad.read();
  sums.extent = shape.extent();
  sums.sum_a = MutableParameter<T>(results.sum_g.data());
  if (of.grad) {
    sums.b = in.x.read();
    sums.sum_ab = MutableParameter<T>(results.sum_gx.data());
  } else {
    results.sum_gx.clear();
  }
  sums.factor = A(2);
  launch_channel_sums(sums, workspace, nullptr);
  return results;
}

template <class T>
void compare(const Case& of, const Inputs<T>& in, const Results<T>& found, const std::string& how) {
  const auto [samples, channels, positions] = std::tuple(of.shape.samples, of.shape.channels, of.shape.positions);
  const std::string name = std::string("flat_stages ") + kName<T> + " " + of.text() + how;
  const double sum_size = std::sqrt(static_cast<double>(positions * samples));
  Comparison contexts(name + ", context", resolution<T>() * 10),
      attentions(name + ", attention", resolution<T>() * 10, 1. / positions),
      grads(name + ", grad_x", resolution<T>() * 10 + resolution<T, T>()),
      weights(name + ", grad_weight", resolution<T>() * 40, sum_size), sums_g(name + ", sum_g", resolution<T>(), sum_size),
      sums_gx(name + ", sum_gx", resolution<T>(), sum_size);
  Values grad_weight(channels, 0);
  for (int64_t n = 0; n < samples; n++) {
    Values attention(positions, 0), context(channels, 0), grad_logit(positions, 0);
    double maximum = -INFINITY, sum = 0, dot = 0;
    for (int64_t p = 0; p < positions; p++) {
      if (!in.counts(n, p)) continue;
      attention[p] = static_cast<double>(in.bias[0]);
      for (int64_t c = 0; c < channels; c++) attention[p] += static_cast<double>(in.weight[c]) * in.x.at(n, c, p);
      maximum = std::fmax(maximum, attention[p]);
    }
    for (int64_t p = 0; p < positions; p++) sum += attention[p] = in.counts(n, p) ? std::exp(attention[p] - maximum) : 0;
    for (int64_t p = 0; p < positions; p++) {
      if (!in.counts(n, p)) continue;
      attention[p] /= sum;
      for (int64_t c = 0; c < channels; c++) context[c] += attention[p] * in.x.at(n, c, p);
    }
    const double* grad_context = nullptr;
    Values of_sample(in.grad_context.begin() + n * channels, in.grad_context.begin() + (n + 1) * channels);
    grad_context = of_sample.data();
    for (int64_t c = 0; c < channels; c++) dot += grad_context[c] * context[c];
    for (int64_t p = 0; p < positions; p++) {
      attentions.add(found.attention[n * positions + p], attention[p]);
      double u = 0;
      for (int64_t c = 0; c < channels && in.counts(n, p); c++) u += grad_context[c] * in.x.at(n, c, p);
      grad_logit[p] = in.counts(n, p) ? attention[p] * (u - dot) : 0;
    }
    for (int64_t c = 0; c < channels; c++) {
      contexts.add(found.context[n * channels + c], context[c]);
      const double scale = of.scale ? in.scale[n * channels + c] : 1;
      double sum_g = 0, sum_gx = 0;
      for (int64_t p = 0; p < positions; p++) {
        const double g = of.grad ? in.grad.at(n, c, p) : 0;
        const double through = attention[p] * grad_context[c] + grad_logit[p] * static_cast<double>(in.weight[c]);
        if (of.grad_x) grads.add(found.grad_x.at(n, c, p), g * scale + (in.counts(n, p) ? through : 0));
        if (in.counts(n, p)) grad_weight[c] += grad_logit[p] * (in.x.at(n, c, p) - context[c]);
        sum_g += in.grad.at(n, c, p);
        sum_gx += in.grad.at(n, c, p) * in.x.at(n, c, p);
      }
      sums_g.add(found.sum_g[n * channels + c], 2 * sum_g);
      if (of.grad) sums_gx.add(found.sum_gx[n * channels + c], sum_gx);
    }
  }
  for (int64_t c = 0; c < channels && of.grad_weight; c++) weights.add(found.grad_weight[c], grad_weight[c]);
}

template <class T>
void test(const Case& of) {
  const Inputs<T> in(of);
  tuning().engine = 2;
  const CudaPoolPlan plan = pool_plan<T>(of.shape.extent(), in.x.read(), {});
  Comparison path(std::string("flat_stages ") + kName<T> + " " + of.text() + ", path", 0);
  const bool flat = of.shape.positions + 1 >= kWidest<T>;  // fewer are left to the first engine
  path.add(plan.path == CudaPoolPath::flat, flat);
  const Results<T> expected = run(of, in, 1);
  compare(of, in, expected, "");
  for (const int multiprocessors : {2, 50}) {
    Comparison bits(std::string("flat_stages ") + kName<T> + " " + of.text() + ", bits", 0);
    bits.add(run(of, in, multiprocessors) == expected, true);
  }
  setenv("GCNET_EMULATION_MULTIPROCESSORS", "1", /*overwrite=*/1);
  tuning().engine = 1;
  compare(of, in, run(of, in, 1), " engine 1");
  tuning().engine = 0;
}

template <class T>
void test_dtype() {
  for (const int64_t channels : {1, 3, 300}) {
    for (const int64_t positions : {1, 7, 49, 50, 196, 255}) {
      test<T>({.shape = {3, channels, positions}});
      test<T>({.shape = {3, channels, positions, false, 1, 3}, .valid = positions > 1});
    }
  }
  test<T>({.shape = {2, 2048, 49, false, 0, 8}});
  test<T>({.shape = {1, 40, 1050}});
  test<T>({.shape = {1, 2048, 1}, .valid = true});
  for (const bool valid : {false, true}) {
    const Shape shape{3, 700, 20};
    test<T>({.shape = shape, .valid = valid, .grad = false, .scale = false});
    test<T>({.shape = shape, .valid = valid, .grad_x = false});
    test<T>({.shape = shape, .valid = valid, .grad_weight = false});
  }
}

}  // namespace

void test_flat_stages(bool small) {
  if (!small) {
    test_dtype<BFloat16>();
    test_dtype<Half>();
    test_dtype<float>();
  }
  test<float>({.shape = {4, 430, 20}});
  test<Half>({.shape = {4, 350, 35, false, 1}, .valid = true});
}

}  // namespace kernel_test
