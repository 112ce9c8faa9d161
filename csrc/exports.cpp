#include "exports.h"

#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <bit>
#include <exception>
#include <string>
#include <vector>

#include "cpu/capability.h"
#include "plan_cpu.h"
#include "plan_cuda.h"

namespace {

using Decisions = std::array<int64_t, GCNET_EXT_CUDA_DECISIONS>;

gcnet_ext::CudaTuning tuning_of(const int64_t* decisions) {
  Decisions given;
  std::copy_n(decisions, given.size(), given.begin());
  return std::bit_cast<gcnet_ext::CudaTuning>(given);  // does not compile unless there are as many
}

const char* name_at(const std::vector<std::string>& names, int64_t index) {
  return index >= 0 && index < static_cast<int64_t>(names.size()) ? names[index].c_str() : nullptr;
}

const char* name_of(gcnet_ext::CudaPoolPath path) {
  constexpr const char* kNames[] = {"rows", "positions", "streamed", "row_items", "position_items", "flat"};
  return kNames[static_cast<int>(path)];
}

}  // namespace

const char* gcnet_ext_version() { return GCNET_EXT_VERSION; }

GcnetExtBuild gcnet_ext_build() {
  GcnetExtBuild build{};
  build.torch = TORCH_VERSION;
  build.abi_target = "2.11";
#if defined(__clang__)
  build.compiler = "clang " __clang_version__;
#else
  build.compiler = "g++ " __VERSION__;
#endif
  build.cuda = GCNET_EXT_CUDA_VERSION;
  build.cuda_architectures = GCNET_EXT_CUDA_ARCHITECTURES;
  build.without_cuda = GCNET_EXT_WITHOUT_CUDA;
  build.openmp = _OPENMP;
#if !defined(__OPTIMIZE__)
  build.debug = 1;
#endif
  return build;
}

const char* gcnet_ext_compiled_capability(int64_t index) {
  static const auto names = gcnet_ext::cpu::compiled_capabilities();
  return name_at(names, index);
}

const char* gcnet_ext_usable_capability(int64_t index) {
  static const auto names = gcnet_ext::cpu::usable_capabilities();
  return name_at(names, index);
}

const char* gcnet_ext_cpu_capability(const char** error) {
  static thread_local std::string told;
  try {
    told = gcnet_ext::cpu::capability();
    return told.c_str();
  } catch (const std::exception& why) {
    told = why.what();
    *error = told.c_str();
    return nullptr;
  }
}

GcnetExtCpuPlan gcnet_ext_plan_cpu(int64_t channels, int64_t positions, int64_t element_size, int64_t channels_last) {
  const auto pool = gcnet_ext::plan_cpu_pool(channels, positions, element_size, channels_last != 0);
  const auto sweep = gcnet_ext::plan_cpu_sweep(channels, positions, element_size, channels_last != 0);
  return {.tile = pool.tile,
          .split = pool.split,
          .splits = pool.splits,
          .sweep_channels = sweep.channels,
          .sweep_positions = sweep.positions,
          .sweep_channel_blocks = sweep.channel_blocks,
          .sweep_position_blocks = sweep.position_blocks};
}

int64_t gcnet_ext_past_caches(int64_t bytes) { return gcnet_ext::plan_cpu_non_temporal(bytes); }

GcnetExtCudaPlan gcnet_ext_plan_cuda(int64_t channels, int64_t positions, int64_t element_size, int64_t channels_last,
                                     int64_t aligned, const int64_t* decisions) {
  const gcnet_ext::CudaShape shape{channels, positions, element_size, channels_last != 0, aligned != 0};
  const gcnet_ext::CudaTuning tuning = tuning_of(decisions);
  const auto pool = gcnet_ext::plan_cuda_pool(shape, tuning);
  const auto slices = gcnet_ext::plan_cuda_transform_slices(shape.channels);
  const auto backward = gcnet_ext::plan_cuda_pool_backward(shape, tuning);
  const auto sums = gcnet_ext::plan_cuda_sums_items(shape, tuning);
  const auto flat = gcnet_ext::plan_cuda_flat_cut(shape.channels, shape.positions, shape.element_size);
  return {.path = name_of(pool.path),
          .vector = pool.vector,
          .threads = pool.threads,
          .tile = pool.tile_positions,
          .tiles_per_split = pool.tiles_per_split,
          .splits = pool.splits,
          .row_lanes = gcnet_ext::plan_cuda_row_lanes(shape, gcnet_ext::cuda_vector(shape), tuning),
          .slice_channels = slices.channels,
          .slices = slices.slices,
          .backward_path = name_of(backward.path),
          .backward_threads = backward.threads,
          .backward_tile = backward.tile_positions,
          .backward_tiles_per_split = backward.tiles_per_split,
          .backward_splits = backward.splits,
          .sums_lanes = sums.lanes,
          .sums_rows = sums.rows,
          .sums_channel_groups = sums.channel_groups,
          .sums_split = sums.split_positions,
          .sums_splits = sums.splits,
          .flat_rows = flat.rows,
          .flat_pieces = flat.pieces,
          .flat_unit_rows = flat.unit_rows,
          .flat_row_vector = flat.row_vector,
          .flat_lanes = flat.lanes,
          .cluster = gcnet_ext::plan_cuda_cluster(shape.channels, pool, tuning),
          .backward_cluster = gcnet_ext::plan_cuda_cluster(shape.channels, backward, tuning)};
}

int64_t gcnet_ext_plan_cuda_lag(int64_t sample_bytes, int64_t samples, int64_t item_bytes, const int64_t* decisions) {
  return gcnet_ext::plan_cuda_lag(sample_bytes, samples, item_bytes, tuning_of(decisions));
}
