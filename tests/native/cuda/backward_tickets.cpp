// The backward pass of the block in one ticketed launch: the bits of the launches that it takes the place of, whatever the grid, the
// lag and the clusters are, and what falls back to them.
#include "../../../csrc/cuda/global_context.cuh"
#include "kernel_test.h"

namespace gcnet_ext::cuda {
GCNET_EXT_COMPILED_HERE(launch_backward_tickets)
}  // namespace gcnet_ext::cuda

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

struct Case {
  Shape shape;
  std::array<int64_t, 2> units = {5, 6};  // of scale and shift; 0: absent
  bool w2 = true, hard_sigmoid = false, norm = true;
  bool relu = false, residual = false, valid = false;
  gcnet_ext::Activation activation = gcnet_ext::Activation::relu;
  bool grad_x = true, grad_mask = true;

  std::string text() const {
    return shape.text() + " units " + std::to_string(units[0]) + "+" + std::to_string(units[1]) + (w2 ? "" : " one layer") +
           (hard_sigmoid ? " hard_sigmoid" : "") + (norm ? "" : " no norm") + (relu ? " final relu" : "") +
           (residual ? " residual" : "") + (valid ? " valid" : "") + (grad_x ? "" : " no dx") + (grad_mask ? "" : " no dw");
  }
};

// The inputs of a backward pass: any numbers do where two ways to compute the same are compared.
template <class T>
struct Inputs {
  using A = acc_t<T>;
  const Case& of;
  FeatureMap<T> x, grad;
  std::vector<T> mask;
  std::array<std::array<std::vector<T>, 4>, 2> weights;  // of a branch: w1, norm_weight, norm_bias, w2
  std::vector<A> context, attention, hidden, gate;
  std::vector<uint8_t> positive, valid;

  explicit Inputs(const Case& of) : of(of), x(FeatureMap<T>::random(of.shape)), grad(FeatureMap<T>::random(of.shape)) {
    const auto [samples, channels, positions, last, offset, gap] = of.shape;
    mask = random_values<T>(channels);
    for (int b = 0; b < 2; b++) {
      const int64_t units = of.units[b];
      weights[b][0] = random_values<T>(units * channels, 2 / std::sqrt(channels));
      if (of.w2 && of.norm) weights[b][1] = random_values<T>(units), weights[b][2] = random_values<T>(units);
      if (of.w2) weights[b][3] = random_values<T>(channels * units, 2 / std::sqrt(std::max<int64_t>(units, 1)));
    }
    context = random_values<A>(samples * channels);
    attention = random_values<A>(samples * positions, 0.5, 0.5);
    hidden = random_values<A>(samples * (of.units[0] + of.units[1]));
    gate = random_values<A>(samples * channels, 0.7, 0.5);
    positive.resize(of.relu ? bytes_of_bits(of.shape) : 0);
    for (uint8_t& byte : positive) byte = static_cast<uint8_t>(random_number() * 128 + 128);
    if (of.valid) valid = random_valid(samples, positions);
  }

  TransformParams<T> transform() {
    TransformParams<T> transform;
    const auto read = [](const std::vector<T>& values) { return values.empty() ? Parameter<T>() : parameter(values); };
    for (int b = 0; b < 2; b++) {
      const auto& [w1, norm_weight, norm_bias, w2] = weights[b];
      transform.branch[b] = {read(w1), {}, read(norm_weight), read(norm_bias), read(w2), {}, of.units[b], transform.units};
      transform.units += of.units[b];
    }
    transform.channels = of.shape.channels;
    transform.norm = of.norm;
    transform.eps = 1e-5f;
    transform.activation = {of.activation, A(0.1)};
    transform.hard_sigmoid = of.hard_sigmoid;
    transform.gate_alpha = A(0.4);
    transform.gate_beta = A(0.5);
    transform.hidden = hidden.data();
    transform.gate = gate.data();
    return transform;
  }
};

// All results, one behind the other, as bytes.
struct Results {
  std::vector<char> bytes;
  int64_t launches = 0;

  template <class Value>
  void add(const std::vector<Value>& values) {
    const auto* start = reinterpret_cast<const char*>(values.data());
    bytes.insert(bytes.end(), start, start + values.size() * sizeof(Value));
  }
};

template <class T>
Results backward(Inputs<T>& inputs) {
  const Case& of = inputs.of;
  const Shape dense{of.shape.samples, of.shape.channels, of.shape.positions};
  auto grad_x = FeatureMap<T>::empty(dense), grad_residual = FeatureMap<T>::empty(dense);
  PoolBackwardParams<T> pool;
  pool.x = inputs.x.read();
  pool.grad = inputs.grad.read();
  if (of.grad_x) pool.grad_x = grad_x.write();
  pool.extent = of.shape.extent();
  pool.weight = parameter(inputs.mask);
  pool.context = inputs.context.data();
  pool.attention = inputs.attention.data();
  pool.valid = {of.valid ? inputs.valid.data() : nullptr, of.shape.positions};
  std::vector<T> grad_mask = unwritten<T>(of.grad_mask ? inputs.mask.size() : 0);
  const auto write = [](std::vector<T>& values) {
    return MutableParameter<T>(values.empty() ? nullptr : values.data(), false);
  };
  BlockGradients<T> gradients;
  gradients.mask_weight = write(grad_mask);
  auto of_weights = inputs.weights;
  std::array<std::vector<T>, 2> of_b1;
  for (int b = 0; b < 2; b++) {
    for (auto& weight : of_weights[b]) weight = unwritten<T>(weight.size());
    of_b1[b] = unwritten<T>(of.units[b]);
    auto& [w1, norm_weight, norm_bias, w2] = of_weights[b];
    gradients.branch[b] = {write(w1), write(of_b1[b]), write(norm_weight), write(norm_bias), write(w2), {}};
  }
  TestWorkspace workspace;
  const int64_t before = emulation::launches();
  global_context_backward(pool, inputs.transform(), gradients, of.relu ? inputs.positive.data() : nullptr,
                          of.residual ? grad_residual.write() : Map<T>{}, workspace, nullptr);
  Results results;
  results.launches = emulation::launches() - before;
  results.add(grad_x.values);
  results.add(grad_residual.values);
  results.add(grad_mask);
  for (int b = 0; b < 2; b++) {
    results.add(of_b1[b]);
    for (const auto& weight : of_weights[b]) results.add(weight);
  }
  return results;
}

void run_on(int multiprocessors) {
  setenv("GCNET_EMULATION_MULTIPROCESSORS", std::to_string(multiprocessors).c_str(), /*overwrite=*/1);
}

void check(bool holds, const std::string& what) {
  comparisons++;
  if (holds) return;
  failures++;
  std::printf("FAILED: %s\n", what.c_str());
}

// taken: whether there is one launch for what needs five otherwise.
template <class T>
void test(const Case& of, bool taken = true) {
  Inputs<T> inputs(of);
  const std::string name = std::string("backward_tickets ") + kName<T> + " " + of.text();
  tuning() = {};
  tuning().engine = 2;
  run_on(4);
  const Results expected = backward(inputs);
  tuning().engine = 3;
  for (const auto& [multiprocessors, lag] : {std::pair<int, int64_t>{1, -1}, {2, 2}, {4, 0}}) {
    run_on(multiprocessors);
    tuning().lag = lag;
    const Results found = backward(inputs);
    check(found.bytes == expected.bytes, name + ", on " + std::to_string(multiprocessors));
    check(found.launches == (taken ? 1 : expected.launches), name + ", launches: " + std::to_string(found.launches));
  }
  tuning() = {};
}

template <class T>
void test_dtype() {
  constexpr auto kGelu = gcnet_ext::Activation::gelu;
  test<T>({{3, 24, 264}});
  test<T>({{2, 72, 288}, {70, 0}, true, true, true, true});
  test<T>({{2, 264, 264, false, 8, 16}, {0, 6}, true, false, false, true, true, true, kGelu});
  test<T>({{2, 16, 256}, {16, 16}, false, true, false, true, true, true});
  test<T>({{2, 520, 256}, {5, 130}, true, true, true, true, false, true});
  test<T>({{1, 1024, 256}, {130, 5}, true, false, true, false, false, false, kGelu});
  test<T>({{2, 1000, 264}, {0, 5}, true, false, true, true, true, true}, true);
  test<T>({{2, 24, 264}, {5, 6}, true, false, true, true, true, false, kGelu, false});
  test<T>({{2, 24, 264}, {5, 6}, true, false, true, true, true, false, kGelu, true, false});
}

// What needs the launches of the second engine.
void test_what_falls_back() {
  test<float>({{2, 24, 260, true}}, false);
  test<float>({{2, 24, 255}}, false);            // rows of 16 bytes
  test<float>({{2, 1028, 256}}, false);          // no tile
  test<float>({{1, 8, 9000}}, false);            // splits of the sums
  test<float>({{2, 24, 256}, {600, 6}}, false);  // too many units
  test<Half>({{2, 24, 264}, {5, 6}, true, false, true, true, true, false, gcnet_ext::Activation::relu, false, false}, false);
}

}  // namespace

void test_backward_tickets(bool small) {
  if (!small) {
    test_dtype<float>();
    test_dtype<Half>();
    test_dtype<BFloat16>();
    test_what_falls_back();
  }
  test<float>({{2, 24, 264}, {5, 6}, true, true, true, true, true, true});
  test<Half>({{2, 264, 256}, {0, 6}, true, false, true, true});
  test<float>({{2, 516, 256}, {5, 6}});
  run_on(1);
}

}  // namespace kernel_test
