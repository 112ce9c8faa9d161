// The forward pass in one ticketed launch, with one block and with several, whose stages follow one another closely or late.
#include "../../../csrc/cuda/global_context_tickets.cuh"
#include "block_reference.h"
#include "kernel_test.h"

namespace gcnet_ext::cuda {
GCNET_EXT_COMPILED_HERE(launch_global_context_tickets)
}  // namespace gcnet_ext::cuda

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

struct Block {
  Shape shape;
  std::array<int64_t, 2> units = {5, 6};  // of scale and shift; 0: absent
  bool w2 = true, gelu = false, residual = false, relu = false, valid = false, in_place = false;
};

// Of how many multiprocessors a GPU is emulated, the lag, and the most splits of a sample's pool (0: the plan decides).
struct Run {
  int multiprocessors;
  int64_t lag, splits = 0;
};

template <class T>
struct BranchOfBlock {
  std::vector<T> w1, b1, norm_weight, norm_bias, w2, b2;
  int64_t units;

  BranchOfBlock(const Block& block, int64_t units) : units(units) {
    const int64_t channels = block.shape.channels;
    if (units == 0) return;
    w1 = random_values<T>(units * channels, 2 / std::sqrt(channels)), b1 = random_values<T>(units);
    if (!block.w2) return;
    norm_weight = random_values<T>(units, 1, 0.25), norm_bias = random_values<T>(units);
    w2 = random_values<T>(channels * units, 2 / std::sqrt(units)), b2 = random_values<T>(channels);
  }
  BranchParams<T> params(int64_t first_unit) const {
    const auto read = [](const std::vector<T>& values) { return values.empty() ? Parameter<T>() : parameter(values); };
    return {read(w1), read(b1), read(norm_weight), read(norm_bias), read(w2), read(b2), units, first_unit};
  }
  BranchValues values() const {
    const auto wide = [](const std::vector<T>& values) { return Values(values.begin(), values.end()); };
    return {wide(w1), wide(b1), wide(norm_weight), wide(norm_bias), wide(w2), wide(b2), units};
  }
};

template <class T>
void test(const Block& block, const Run& run) {
  const Shape& shape = block.shape;
  const int64_t samples = shape.samples, channels = shape.channels, positions = shape.positions;
  tuning().engine = 3;
  tuning().lag = run.lag;
  tuning().splits = run.splits;
  setenv("GCNET_EMULATION_MULTIPROCESSORS", std::to_string(run.multiprocessors).c_str(), /*overwrite=*/1);
  auto x = FeatureMap<T>::random(shape);
  const auto residual = FeatureMap<T>::random(shape);
  auto separate = FeatureMap<T>::empty({samples, channels, positions});
  const std::vector<uint8_t> valid = block.valid ? random_valid(samples, positions) : std::vector<uint8_t>();
  const auto mask = random_values<T>(channels, 3 / std::sqrt(channels)), mask_bias = random_values<T>(1);
  const BranchOfBlock<T> scale(block, block.units[kScale]), shift(block, block.units[kShift]);

  BlockReference expected(samples, channels, positions);
  expected.options.activation = block.gelu ? 3 : 1;
  expected.x = values_of(x);
  expected.mask_weight.assign(mask.begin(), mask.end());
  expected.mask_bias = static_cast<double>(mask_bias[0]);
  if (block.residual) expected.residual = values_of(residual);
  expected.valid.assign(valid.begin(), valid.end());
  expected.final_relu = block.relu;
  expected.branches = {scale.values(), shift.values()};
  expected.forward();

  const int64_t units = scale.units + shift.units;
  auto context = unwritten<float>(samples * channels), attention = unwritten<float>(samples * positions);
  auto hidden = unwritten<float>(samples * units), gate = unwritten<float>(scale.units ? samples * channels : 0);
  auto of_shift = unwritten<float>(samples * channels);
  auto bits = unwritten<uint8_t>(block.relu ? bytes_of_bits(shape) : 0);
  PoolParams<T> pool;
  pool.x = x.read();
  pool.extent = shape.extent();
  pool.weight = parameter(mask);
  pool.bias = parameter(mask_bias);
  pool.context = context.data();
  pool.attention = attention.data();
  pool.merged_later = true;
  pool.valid = {block.valid ? valid.data() : nullptr, positions};
  TransformParams<T>& transform = pool.transform;
  transform.branch[kScale] = scale.params(0);
  transform.branch[kShift] = shift.params(scale.units);
  transform.channels = channels;
  transform.units = units;
  transform.samples = samples;
  transform.norm = true;
  transform.eps = static_cast<float>(expected.options.eps);
  transform.activation = {static_cast<gcnet_ext::Activation>(expected.options.activation), 0.f};
  transform.context = context.data();
  transform.hidden = hidden.data();
  transform.gate = gate.data();
  transform.shift = of_shift.data();
  Fusion<T> fusion;
  fusion.x = pool.x;
  fusion.out = block.in_place ? x.write() : separate.write();
  fusion.extent = shape.extent();
  if (scale.units) fusion.scale = Parameter<T>(gate.data());
  if (shift.units) fusion.shift = Parameter<T>(of_shift.data());
  if (block.residual) fusion.residual = residual.read();
  fusion.relu = block.relu;
  fusion.positive = block.relu ? bits.data() : nullptr;
  TestWorkspace workspace;
  const bool launched = launch_global_context_tickets(pool, fusion, workspace, nullptr);

  const std::string name = std::string("forward_tickets ") + kName<T> + " " + shape.text() + " on " +
                           std::to_string(run.multiprocessors) + ", lag " + std::to_string(run.lag);
  Comparison("the launch of " + name, 0).add(launched, 1);
  const double sums = resolution<T>() * 100;
  compare(name + ", context", context, expected.context, sums);
  compare(name + ", attention", attention, expected.attention, sums);
  if (scale.units) compare(name + ", gate", gate, expected.t[kScale], sums);
  compare(name + ", out", values_of(block.in_place ? x : separate), expected.out, sums + resolution<T, T>());
  tuning() = {};
}

}  // namespace

void test_forward_tickets(bool small) {
  // Samples of two pieces or more, splits of the pool, and in clusters items that one of the blocks does not have.
  test<float>({{3, 20, 256}, {5, 6}, true, false, true, true}, {2, 1});
  test<float>({{2, 40, 320}, {5, 0}, true, true, false, false, true, true}, {1, -1});
  test<float>({{2, 64, 256}, {0, 64}, false}, {2, 0});
  test<float>({{1, 520, 256}, {5, 33}, true, false, true}, {2, -1});
  test<float>({{2, 8, 700}, {5, 6}}, {2, 1, 3});  // several tiles in a split
  if (small) return;
  for (const Run& run : {Run{1, 0}, Run{2, 9}, Run{4, 1000}, Run{3, -1}}) {
    test<float>({{5, 24, 260, false, 4, 8}, {5, 6}, true, false, true, true}, run);
    test<Half>({{3, 40, 264}, {33, 6}, true, true, false, true, true}, run);
    test<BFloat16>({{2, 264, 272}, {0, 6}, true, false, true, false, false, true}, run);
    test<Half>({{2, 520, 264}, {5, 0}, true, false, false, true, true}, run);
    test<float>({{1, 776, 260}, {40, 33}, true, false, true, false, false, true}, run);
    test<BFloat16>({{2, 72, 256}, {72, 72}, false, false, true, true}, run);
  }
}

}  // namespace kernel_test
