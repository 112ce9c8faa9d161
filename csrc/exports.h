// What other programs may ask of libgcnet_ext.so besides its operators: what was built, and how it decides. csrc/python turns the
// answers into Python objects. C functions and plain C types, so that who asks needs neither torch nor the same compiler.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// The version of the package. It comes first: with another version, everything below may be another.
const char* gcnet_ext_version();

struct GcnetExtBuild {
  const char *torch, *abi_target, *compiler;             // torch: whose headers were used
  const char *cuda, *cuda_architectures, *without_cuda;  // of the library of the CUDA kernels, or why there is none
  int64_t openmp, debug;
};
GcnetExtBuild gcnet_ext_build();

// The names of the CPU capabilities that were compiled, and of those that this processor runs, the best first. Null behind the
// last one.
const char* gcnet_ext_compiled_capability(int64_t index);
const char* gcnet_ext_usable_capability(int64_t index);
// The capability in use; or null, and `error` says why there is none. Both are valid until this thread asks again.
const char* gcnet_ext_cpu_capability(const char** error);

// How a sample of [C, P] elements is cut. The functions are those of plan_cpu.h.
struct GcnetExtCpuPlan {
  int64_t tile, split, splits;
  int64_t sweep_channels, sweep_positions, sweep_channel_blocks, sweep_position_blocks;
};
GcnetExtCpuPlan gcnet_ext_plan_cpu(int64_t channels, int64_t positions, int64_t element_size, int64_t channels_last);
// Whether an output is written past the caches, in a call that goes through maps of so many bytes.
int64_t gcnet_ext_past_caches(int64_t bytes);

// The same for CUDA, by the functions of plan_cuda.h. decisions: GCNET_EXT_CUDA_DECISIONS numbers, in the order of CudaTuning.
#define GCNET_EXT_CUDA_DECISIONS 9
struct GcnetExtCudaPlan {
  const char* path;
  int64_t vector, threads, tile, tiles_per_split, splits;
  int64_t row_lanes, slice_channels, slices;
  const char* backward_path;
  int64_t backward_threads, backward_tile, backward_tiles_per_split, backward_splits;
  int64_t sums_lanes, sums_rows, sums_channel_groups, sums_split, sums_splits;
  int64_t flat_rows, flat_pieces, flat_unit_rows, flat_row_vector, flat_lanes;
  int64_t cluster, backward_cluster;
};
GcnetExtCudaPlan gcnet_ext_plan_cuda(int64_t channels, int64_t positions, int64_t element_size, int64_t channels_last,
                                     int64_t aligned, const int64_t* decisions);
int64_t gcnet_ext_plan_cuda_lag(int64_t sample_bytes, int64_t samples, int64_t item_bytes, const int64_t* decisions);

}  // extern "C"
#pragma GCC visibility pop
