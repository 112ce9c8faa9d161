// global_context and global_context_backward: the pool, the transform in its tail or batched, the fusion, and back.
#include "../../../csrc/cuda/global_context.cuh"
#include "block_reference.h"
#include "kernel_test.h"

namespace gcnet_ext::cuda {
GCNET_EXT_COMPILED_HERE(launch_transform)
GCNET_EXT_COMPILED_HERE(launch_transform_backward)
GCNET_EXT_COMPILED_HERE(launch_transform_split)
GCNET_EXT_COMPILED_HERE(launch_transform_backward_split)
GCNET_EXT_COMPILED_HERE(launch_parameter_gradients)
}  // namespace gcnet_ext::cuda

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

struct Case {
  Shape shape;
  std::array<int64_t, 2> units = {4, 4};  // of scale and shift; 0: absent
  bool attends = true, w2 = true, float32_parameters = false;
  BlockOptions options = {};
  bool residual = false, relu = false, valid = false;
  int split_on = 0;  // multiprocessors on which the transform runs in the stages of transform_split.cuh; 0: it does not

  std::string text() const {
    return shape.text() + " units " + std::to_string(units[0]) + "+" + std::to_string(units[1]) + (attends ? "" : " avg") +
           (w2 ? "" : " one layer") + (float32_parameters ? " float32 parameters" : "") + (options.norm ? "" : " no norm") +
           " " + kActivations[options.activation] + (options.hard_sigmoid ? " hard_sigmoid" : "") +
           (residual ? " residual" : "") + (relu ? " final relu" : "") + (valid ? " valid" : "") +
           (split_on ? " split on " + std::to_string(split_on) : "");
  }
};

// A parameter in its own dtype: `narrow` in that of x or `wide` in float32.
template <class T>
struct Weight {
  std::vector<T> narrow;
  std::vector<float> wide;

  Weight() = default;
  Weight(int64_t count, bool is_float32, double scale) {
    if (is_float32) {
      wide = random_values<float>(count, scale, scale / 4);
    } else {
      narrow = random_values<T>(count, scale, scale / 4);
    }
  }

  Values values() const { return wide.empty() ? Values(narrow.begin(), narrow.end()) : Values(wide.begin(), wide.end()); }
  Parameter<T> read() const {
    return wide.empty() ? Parameter<T>(narrow.empty() ? nullptr : narrow.data(), false) : Parameter<T>(wide.data(), true);
  }
  MutableParameter<T> write() {
    if (!wide.empty()) return {wide.data(), true};
    return {narrow.empty() ? nullptr : narrow.data(), false};
  }
};

template <class T>
Weight<T> unwritten_like(const Weight<T>& weight) {
  Weight<T> like;
  like.narrow = unwritten<T>(weight.narrow.size());
  like.wide = unwritten<float>(weight.wide.size());
  return like;
}

template <class T>
using Branch = std::array<Weight<T>, 6>;  // w1, b1, norm_weight, norm_bias, w2, b2

template <class T>
Branch<T> random_branch(const Case& block, int64_t units) {
  const int64_t channels = block.shape.channels;
  if (units == 0) return {};
  const auto make = [&](int64_t count, double scale) { return Weight<T>(count, block.float32_parameters, scale); };
  Branch<T> branch{make(units * channels, 2 / std::sqrt(channels)), make(units, 1)};
  if (!block.w2) return branch;
  if (block.options.norm) branch[2] = make(units, 1), branch[3] = make(units, 1);
  branch[4] = make(channels * units, 2 / std::sqrt(units)), branch[5] = make(channels, 1);
  return branch;
}

template <class T>
void test(const Case& block) {
  using A = acc_t<T>;
  const Shape& shape = block.shape;
  const int64_t samples = shape.samples, channels = shape.channels, positions = shape.positions;
  const Shape dense{samples, channels, positions, shape.channels_last};
  tuning().engine = block.split_on ? 2 : 0;
  setenv("GCNET_EMULATION_MULTIPROCESSORS", std::to_string(std::max(block.split_on, 1)).c_str(), /*overwrite=*/1);
  auto x = FeatureMap<T>::random(shape);
  const auto grad = FeatureMap<T>::random(shape), residual = FeatureMap<T>::random(shape);
  auto out = FeatureMap<T>::empty(dense), grad_x = FeatureMap<T>::empty(dense), through_relu = FeatureMap<T>::empty(dense);
  const std::vector<uint8_t> valid = block.valid ? random_valid(samples, positions) : std::vector<uint8_t>();
  // A NaN at a position that does not count reaches only the fusion and sum_p g x, and a block without a scale has no such sum.
  if (block.units[kScale] == 0) forget(x, valid);
  const Weight<T> mask = block.attends ? Weight<T>(channels, block.float32_parameters, 3 / std::sqrt(channels)) : Weight<T>();
  const Weight<T> mask_bias = block.attends ? Weight<T>(1, block.float32_parameters, 1) : Weight<T>();
  const std::array<Branch<T>, 2> branches{random_branch<T>(block, block.units[0]), random_branch<T>(block, block.units[1])};
  const int64_t units = block.units[0] + block.units[1];
  auto context = unwritten<A>(samples * channels), attention = unwritten<A>(block.attends ? samples * positions : 0);
  auto hidden = unwritten<A>(samples * units), gate = unwritten<A>(block.units[0] ? samples * channels : 0);

  TransformParams<T> transform;
  const auto read = [](const Weight<T>& weight) { return weight.read(); };
  for (int b = 0; b < 2; b++) {
    const Branch<T>& w = branches[b];
    transform.branch[b] = {read(w[0]), read(w[1]), read(w[2]),     read(w[3]),
                           read(w[4]), read(w[5]), block.units[b], b ? block.units[0] : 0};
  }
  transform.channels = channels;
  transform.units = units;
  transform.norm = block.options.norm;
  transform.activation = {static_cast<gcnet_ext::Activation>(block.options.activation), static_cast<A>(kSlope)};
  transform.hard_sigmoid = block.options.hard_sigmoid;
  transform.eps = static_cast<A>(block.options.eps);
  transform.gate_alpha = static_cast<A>(block.options.gate_alpha);
  transform.gate_beta = static_cast<A>(block.options.gate_beta);
  transform.hidden = hidden.data();
  transform.gate = gate.data();

  TestWorkspace workspace;
  auto bits = unwritten<uint8_t>(block.relu ? bytes_of_bits(shape) : 0);
  const Valid<T> of_samples{block.valid ? valid.data() : nullptr, positions};
  PoolParams<T> pool;
  pool.x = x.read();
  pool.extent = shape.extent();
  pool.weight = mask.read();
  pool.bias = mask_bias.read();
  pool.context = context.data();
  pool.attention = attention.data();
  pool.transform = transform;
  pool.valid = of_samples;
  Fusion<T> fuse;
  fuse.out = out.write();
  if (block.residual) fuse.residual = residual.read();
  fuse.relu = block.relu;
  fuse.positive = block.relu ? bits.data() : nullptr;
  global_context(pool, fuse, workspace, nullptr);

  PoolBackwardParams<T> pool_backward;
  pool_backward.grad = grad.read();
  pool_backward.x = x.read();
  pool_backward.grad_x = grad_x.write();
  pool_backward.extent = shape.extent();
  pool_backward.weight = mask.read();
  pool_backward.context = context.data();
  pool_backward.attention = attention.data();
  pool_backward.valid = of_samples;
  Weight<T> grad_mask = unwritten_like(mask), grad_mask_bias = unwritten_like(mask_bias);
  BlockGradients<T> of_block;
  of_block.mask_weight = grad_mask.write();
  of_block.mask_bias = grad_mask_bias.write();
  std::array<Branch<T>, 2> gradients;
  for (int b = 0; b < 2; b++) {
    for (int i = 0; i < 6; i++) gradients[b][i] = unwritten_like(branches[b][i]);
    Branch<T>& w = gradients[b];
    of_block.branch[b] = {w[0].write(), w[1].write(), w[2].write(), w[3].write(), w[4].write(), w[5].write()};
  }
  TestWorkspace backward_workspace;
  const bool keeps = block.relu && block.residual;  // the gradient of the residual
  global_context_backward(pool_backward, transform, of_block, block.relu ? bits.data() : nullptr,
                          keeps ? through_relu.write() : Map<T>{}, backward_workspace, nullptr);

  BlockReference expected(samples, channels, positions);
  expected.options = block.options;
  expected.x = values_of(x);
  expected.mask_weight = mask.values();
  if (block.residual) expected.residual = values_of(residual);
  expected.valid.assign(valid.begin(), valid.end());
  expected.final_relu = block.relu;
  expected.mask_bias = block.attends ? mask_bias.values()[0] : 0;
  for (int b = 0; b < 2; b++) {
    const Branch<T>& w = branches[b];
    expected.branches[b] = {w[0].values(), w[1].values(), w[2].values(), w[3].values(),
                            w[4].values(), w[5].values(), block.units[b]};
  }
  expected.forward();
  expected.backward(values_of(grad));

  const std::string name = std::string("global_context ") + kName<T> + " " + block.text();
  const double sums = resolution<T>() * 100, stored = sums + (block.float32_parameters ? 1e-7 : resolution<T, T>());
  compare(name + ", context", Values(context.begin(), context.end()), expected.context, sums);
  if (block.attends) compare(name + ", attention", Values(attention.begin(), attention.end()), expected.attention, sums);
  if (block.units[0]) compare(name + ", gate", Values(gate.begin(), gate.end()), expected.t[0], sums);
  compare(name + ", out", values_of(out), expected.out, sums + resolution<T, T>());
  if (keeps) compare(name + ", grad_residual", values_of(through_relu), expected.grad_residual, 0);
  compare(name + ", grad_x", values_of(grad_x), expected.grad_x, sums + resolution<T, T>());
  if (block.attends) compare(name + ", grad_mask_weight", grad_mask.values(), expected.grad_mask_weight, stored);
  if (block.attends) compare(name + ", grad_mask_bias", grad_mask_bias.values(), {0}, 0);
  for (int b = 0; b < 2; b++) {
    const BranchValues& wanted = expected.gradients[b];
    const std::array<const Values*, 6> all{&wanted.w1,        &wanted.b1, &wanted.norm_weight,
                                           &wanted.norm_bias, &wanted.w2, &wanted.b2};
    for (int i = 0; i < 6; i++) {
      const Values found = gradients[b][i].values();
      if (!found.empty())
        compare(name + ", gradient " + std::to_string(i) + " of branch " + std::to_string(b), found, *all[i], stored);
    }
  }
}

// Every activation by itself, up to arguments for which its terms overflow.
template <class A>
void test_activations() {
  for (int kind = 0; kind < static_cast<int>(kActivations.size()); kind++) {
    const ActivationFunction<A> device{static_cast<gcnet_ext::Activation>(kind), static_cast<A>(kSlope)};
    const std::string name = std::string(kName<A>) + " " + kActivations[kind];
    Comparison values(name, resolution<A>()), slopes(name + ", slope", resolution<A>());
    for (const double z : {0., 1e-6, 0.3, 1., 2.9, 3., 3.1, 7., 30., 99., 101., 1e10, 1e30, std::nan("")}) {
      for (const A at : {static_cast<A>(z), static_cast<A>(-z)}) {
        const A value = device.is_relu_or_silu() ? device.template value<true>(at) : device.template value<false>(at);
        const A slope =
            device.is_relu_or_silu() ? device.template backward<true>(at, 2) : device.template backward<false>(at, 2);
        values.add(value, activation(kind, at));
        if (!std::isnan(z)) slopes.add(slope, 2 * activation_slope(kind, at));
      }
    }
  }
}

template <class T>
void test_dtype() {
  BlockOptions hard, plain;
  hard.hard_sigmoid = true;
  plain.norm = false;
  for (const bool channels_last : {false, true}) {
    test<T>({{2, 16, 24, channels_last}});
    test<T>({{3, 1, 49, channels_last}});
    test<T>({{3, 10, 49, channels_last}, {3, 5}});
    test<T>({{2, 20, 84, channels_last}, {3, 5}});
    test<T>({{2, 520, 20, channels_last}, {3, 5}});
    test<T>({{2, 24, 40, channels_last, 1}, {8, 0}});
    test<T>({{2, 24, 40, channels_last, 0, 8}, {0, 8}, true, true, true});
    test<T>({{2, 12, 9, channels_last}, {4, 4}, false});
    test<T>({{2, 12, 9, channels_last}, {12, 12}, true, false});
    for (int activation = 0; activation < static_cast<int>(kActivations.size()); activation++) {
      BlockOptions options;
      options.activation = activation;
      test<T>({{2, 12, 9, channels_last}, {4, 6}, true, true, false, options});
      options.norm = false;
      test<T>({{9, 520, 2, channels_last}, {70, 70}, true, true, false, options});
    }
    for (const bool attends : {false, true}) {
      for (const bool relu : {false, true}) {
        test<T>({{2, 13, 9, channels_last, 1, 5}, {4, 6}, attends, true, false, {}, !relu, relu, false});
        test<T>({{2, 20, 84, channels_last, 0, 8}, {4, 6}, attends, true, false, {}, true, relu, true});
        test<T>({{3, 300, 49, channels_last}, {0, 6}, attends, true, false, {}, true, relu, true});
        test<T>({{2, 8, 1, channels_last}, {0, 6}, attends, true, false, {}, false, relu, true});
      }
    }
    test<T>({{2, 12, 9, channels_last}, {4, 6}, true, true, false, hard});
    test<T>({{2, 12, 9, channels_last}, {4, 6}, true, true, false, plain});
    test<T>({{9, 520, 8, channels_last}, {130, 130}});  // too many weights for one block
    test<T>({{2, 1031, 3, channels_last}, {67, 66}, false});
    test<T>({{3, 600, 4, channels_last}, {600, 0}, true, false});
  }
}

// The stages of transform_split.cuh: slices, tiles of samples and turns that are full, one more and one less; every path of the
// pool in front of them.
template <class T>
void test_split() {
  BlockOptions hard, plain, gelu;
  hard.hard_sigmoid = true;
  plain.norm = false;
  plain.activation = gelu.activation = 3;
  for (const bool channels_last : {false, true}) {
    for (const int on : {1, 40}) {
      test<T>({{9, 130, 24, channels_last}, {5, 34}, true, true, false, {}, true, true, false, on});
      test<T>({{2, 520, 20, channels_last, 1}, {33, 3}, true, true, true, hard, false, false, false, on});
      test<T>({{3, 64, 84, channels_last}, {12, 0}, true, true, false, gelu, false, false, true, on});
      test<T>({{3, 64, 304, channels_last}, {12, 3}, true, true, false, {}, true, true, true, on});
      test<T>({{17, 10, 9, channels_last}, {0, 4}, false, true, false, plain, false, false, false, on});
      test<T>({{3, 70, 9, channels_last}, {70, 70}, true, false, false, hard, false, true, false, on});
      test<T>({{2, 600, 12, channels_last}, {0, 600}, false, false, false, {}, true, false, true, on});
      for (const bool residual : {false, true}) {
        test<T>(
            {{3, 136, channels_last ? 72 : 264, channels_last}, {5, 6}, true, true, false, {}, residual, true, residual, on});
        test<T>({{2, 16, 2400, channels_last}, {5, 0}, false, true, false, {}, residual, true, residual, on});
      }
    }
    test<T>({{2, 1100, 4, channels_last}, {300, 100}, true, true, false, {}, false, false, false, 2});
    test<T>({{9, 2048, 3, channels_last}, {129, 128}, true, true, false, {}, false, false, false, 1});
    test<T>({{1, 24, 3000, channels_last}, {4, 4}, true, true, false, {}, false, false, false, 132});
    test<T>({{2, 1, 1, channels_last}, {1, 1}, true, true, false, {}, false, false, false, 132});
    test<T>({{2, 20, 8, channels_last}, {300, 300}, true, true, false, {}, false, false, false, 1});  // does not fit
  }
}

}  // namespace

void test_global_context(bool small) {
  test_activations<float>();
  test_activations<double>();
  if (!small) {
    test_dtype<double>();
    test_dtype<BFloat16>();
    test_dtype<Half>();
    test_dtype<float>();
    test_split<BFloat16>();
    test_split<Half>();
    test_split<float>();
    test<double>({{2, 20, 8, false}, {3, 3}, true, true, false, {}, false, false, false, 1});  // does not fit
  }
  test<float>({{2, 20, 144, false}, {5, 6}});
  test<float>({{2, 20, 140, true}, {5, 6}});
  test<float>({{2, 260, 70, true}, {5, 6}});
  test<float>({{2, 300, 40, false}, {33, 5}, false});
  test<float>({{9, 270, 4, false}, {50, 80}});  // too many weights for one block
  test<float>({{40, 10, 2, false}, {5, 6}});    // more samples than parameter_gradients.cuh stages at a time
  for (const bool channels_last : {false, true}) {
    for (const bool attends : {false, true}) {
      test<float>({{2, 12, 40, channels_last}, {0, 6}, attends, true, false, {}, true, true, true});
    }
  }
  for (const int on : {1, 4}) {
    test<float>({{9, 270, 40, false}, {37, 5}, true, true, false, {}, false, false, true, on});
    test<float>({{2, 72, 140, true}, {0, 72}, true, false, false, {}, true, true, false, on});
    test<float>({{2, 136, 40, true}, {5, 6}, true, true, false, {}, false, true, false, on});
    test<float>({{2, 16, 40, false}, {5, 6}, true, true, false, {}, true, true, false, on});
    test<float>({{2, 16, 264, false}, {5, 6}, true, true, false, {}, true, true, false, on});
  }
  test<double>({{1, 20, 70, false}, {5, 6}});
  test<double>({{1, 20, 70, true}, {5, 6}});
}

}  // namespace kernel_test
