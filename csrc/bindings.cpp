// gcnet_ext._C: what was built and how it decides, for Python. The operators are not here: they are in torch.ops.gcnet_ext. It
// includes no torch header but that of the version: pybind11 depends on CPython's ABI and the operators on the LibTorch stable
// ABI, and no file depends on both.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <array>
#include <bit>

#include "cpu/capability.h"
#include "plan_cpu.h"
#include "plan_cuda.h"
#include "plain_layers.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

py::dict build_info() {
  return py::dict("version"_a = GCNET_EXT_VERSION, "torch"_a = TORCH_VERSION, "abi_target"_a = "2.11", "compiler"_a = kCompiler,
                  "openmp"_a = std::to_string(_OPENMP), "capabilities"_a = gcnet_ext::cpu::compiled_capabilities(),
                  "cuda"_a = GCNET_EXT_CUDA_VERSION, "cuda_architectures"_a = GCNET_EXT_CUDA_ARCHITECTURES,
                  "without_cuda"_a = GCNET_EXT_WITHOUT_CUDA,
#if defined(__OPTIMIZE__)
                  "debug"_a = false
#else
                  "debug"_a = true
#endif
  );
}

py::dict plan_cpu(int64_t channels, int64_t positions, int64_t element_size, bool channels_last) {
  const auto pool = gcnet_ext::plan_cpu_pool(channels, positions, element_size, channels_last);
  const auto sweep = gcnet_ext::plan_cpu_sweep(channels, positions, element_size, channels_last);
  return py::dict("tile"_a = pool.tile, "split"_a = pool.split, "splits"_a = pool.splits, "sweep_channels"_a = sweep.channels,
                  "sweep_positions"_a = sweep.positions, "sweep_channel_blocks"_a = sweep.channel_blocks,
                  "sweep_position_blocks"_a = sweep.position_blocks);
}

py::dict plan_cuda(const gcnet_ext::CudaShape& shape, const gcnet_ext::CudaTuning& tuning) {
  const auto pool = gcnet_ext::plan_cuda_pool(shape, tuning);
  const int row_lanes = gcnet_ext::plan_cuda_row_lanes(shape, gcnet_ext::cuda_vector(shape), tuning);
  const auto slices = gcnet_ext::plan_cuda_transform_slices(shape.channels);
  const auto backward = gcnet_ext::plan_cuda_pool_backward(shape, tuning);
  const auto sums = gcnet_ext::plan_cuda_sums_items(shape, tuning);
  const auto flat = gcnet_ext::plan_cuda_flat_cut(shape.channels, shape.positions, shape.element_size);
  const char* paths[] = {"rows", "positions", "streamed", "row_items", "position_items", "flat"};
  return py::dict("path"_a = paths[static_cast<int>(pool.path)], "vector"_a = pool.vector, "threads"_a = pool.threads,
                  "tile"_a = pool.tile_positions, "tiles_per_split"_a = pool.tiles_per_split, "splits"_a = pool.splits,
                  "row_lanes"_a = row_lanes, "slice_channels"_a = slices.channels, "slices"_a = slices.slices,
                  "backward_path"_a = paths[static_cast<int>(backward.path)], "backward_threads"_a = backward.threads,
                  "backward_tile"_a = backward.tile_positions, "backward_tiles_per_split"_a = backward.tiles_per_split,
                  "backward_splits"_a = backward.splits, "sums_lanes"_a = sums.lanes, "sums_rows"_a = sums.rows,
                  "sums_channel_groups"_a = sums.channel_groups, "sums_split"_a = sums.split_positions,
                  "sums_splits"_a = sums.splits, "flat_rows"_a = flat.rows, "flat_pieces"_a = flat.pieces,
                  "flat_unit_rows"_a = flat.unit_rows, "flat_row_vector"_a = flat.row_vector, "flat_lanes"_a = flat.lanes,
                  "cluster"_a = gcnet_ext::plan_cuda_cluster(shape.channels, pool, tuning),
                  "backward_cluster"_a = gcnet_ext::plan_cuda_cluster(shape.channels, backward, tuning));
}

using Decisions = std::array<int64_t, sizeof(gcnet_ext::CudaTuning) / sizeof(int64_t)>;  // in the order of CudaTuning

py::dict plan(const std::string& device, int64_t channels, int64_t positions, int64_t element_size, bool channels_last,
              bool aligned, const Decisions& tuning) {
  if (channels < 1 || positions < 1 || element_size < 1) {
    throw py::value_error("channels, positions and element_size must be at least 1, got " + std::to_string(channels) + ", " +
                          std::to_string(positions) + " and " + std::to_string(element_size));
  }
  if (device == "cpu") return plan_cpu(channels, positions, element_size, channels_last);
  if (device == "cuda")
    return plan_cuda({channels, positions, element_size, channels_last, aligned}, std::bit_cast<gcnet_ext::CudaTuning>(tuning));
  throw py::value_error("device must be 'cpu' or 'cuda', got '" + device + "'");
}

int64_t plan_cuda_lag(int64_t sample_bytes, int64_t samples, int64_t item_bytes, const Decisions& tuning) {
  if (sample_bytes < 0 || samples < 0 || item_bytes < 1) {
    throw py::value_error("sample_bytes and samples must be at least 0, and item_bytes at least 1");
  }
  return gcnet_ext::plan_cuda_lag(sample_bytes, samples, item_bytes, std::bit_cast<gcnet_ext::CudaTuning>(tuning));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built and how it decides; the operators are in torch.ops.gcnet_ext.";
  m.def("build_info", &build_info, "What was compiled: version, torch, compiler, OpenMP, CPU capabilities.");
  m.def("cpu_capability", &gcnet_ext::cpu::capability,
        "The vector instructions in use, by their name in usable_capabilities().");
  m.def("usable_capabilities", &gcnet_ext::cpu::usable_capabilities,
        "The capabilities that this processor can run, best first.");
  static PyMethodDef class_version{"class_version", &gcnet_ext::class_version, METH_O,
                                   "A number that changes with the attributes of a class and its bases, or 0."};
  m.add_object("class_version", py::reinterpret_steal<py::object>(PyCFunction_New(&class_version, nullptr)));
  static PyMethodDef unchanged{
      "unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&gcnet_ext::unchanged)), METH_FASTCALL,
      "The fields of objects that are asked for, if none of what was recorded has changed; else None."};
  m.add_object("unchanged", py::reinterpret_steal<py::object>(PyCFunction_New(&unchanged, nullptr)));
  m.def("past_caches", &gcnet_ext::plan_cpu_non_temporal,
        "Whether the CPU kernels write an output past the caches, in a call that goes through maps of so many bytes.",
        "bytes"_a);
  m.def("plan", &plan, "How the kernels of a device cut the attention pool of a sample of [C, P] elements.", "device"_a,
        "channels"_a, "positions"_a, "element_size"_a = 4, "channels_last"_a = false, "aligned"_a = true,
        "tuning"_a = Decisions{});
  m.def("plan_cuda_lag", &plan_cuda_lag,
        "How many items of its first stage the last stage of a sample stays behind in a ticketed launch.", "sample_bytes"_a,
        "samples"_a, "item_bytes"_a, "tuning"_a = Decisions{});
}
