// gcnet_ext._C: what was built and how it decides, and the look at a block's layers, for Python. It has no kernel: it asks
// libgcnet_ext.so, by the functions of exports.h. Nothing else depends on the version of Python, and nothing here on torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../exports.h"
#include "plain_layers.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// Both are built together; but one of them may be left from another build, or another library of that name be loaded already.
void require_same_version() {
  if (const std::string version = gcnet_ext_version(); version != GCNET_EXT_VERSION) {
    throw py::import_error("gcnet_ext._C is of version " GCNET_EXT_VERSION " and libgcnet_ext.so, which it needs, of version " +
                           version + ": they must come from one build");
  }
}

std::vector<std::string> listed(const char* (*name_at)(int64_t)) {
  std::vector<std::string> names;
  while (const char* name = name_at(static_cast<int64_t>(names.size()))) names.emplace_back(name);
  return names;
}

py::dict build_info() {
  const GcnetExtBuild build = gcnet_ext_build();
  return py::dict("version"_a = gcnet_ext_version(), "torch"_a = build.torch, "abi_target"_a = build.abi_target,
                  "compiler"_a = build.compiler, "openmp"_a = std::to_string(build.openmp),
                  "capabilities"_a = listed(gcnet_ext_compiled_capability), "cuda"_a = build.cuda,
                  "cuda_architectures"_a = build.cuda_architectures, "without_cuda"_a = build.without_cuda,
                  "debug"_a = build.debug != 0);
}

std::string cpu_capability() {
  const char* error = nullptr;
  const char* name = gcnet_ext_cpu_capability(&error);
  if (name == nullptr) throw std::runtime_error(error);
  return name;
}

py::dict plan_cpu(int64_t channels, int64_t positions, int64_t element_size, bool channels_last) {
  const GcnetExtCpuPlan plan = gcnet_ext_plan_cpu(channels, positions, element_size, channels_last);
  return py::dict("tile"_a = plan.tile, "split"_a = plan.split, "splits"_a = plan.splits,
                  "sweep_channels"_a = plan.sweep_channels, "sweep_positions"_a = plan.sweep_positions,
                  "sweep_channel_blocks"_a = plan.sweep_channel_blocks, "sweep_position_blocks"_a = plan.sweep_position_blocks);
}

using Decisions = std::array<int64_t, GCNET_EXT_CUDA_DECISIONS>;

py::dict plan_cuda(int64_t channels, int64_t positions, int64_t element_size, bool channels_last, bool aligned,
                   const Decisions& tuning) {
  const GcnetExtCudaPlan plan = gcnet_ext_plan_cuda(channels, positions, element_size, channels_last, aligned, tuning.data());
  return py::dict("path"_a = plan.path, "vector"_a = plan.vector, "threads"_a = plan.threads, "tile"_a = plan.tile,
                  "tiles_per_split"_a = plan.tiles_per_split, "splits"_a = plan.splits, "row_lanes"_a = plan.row_lanes,
                  "slice_channels"_a = plan.slice_channels, "slices"_a = plan.slices, "backward_path"_a = plan.backward_path,
                  "backward_threads"_a = plan.backward_threads, "backward_tile"_a = plan.backward_tile,
                  "backward_tiles_per_split"_a = plan.backward_tiles_per_split, "backward_splits"_a = plan.backward_splits,
                  "sums_lanes"_a = plan.sums_lanes, "sums_rows"_a = plan.sums_rows,
                  "sums_channel_groups"_a = plan.sums_channel_groups, "sums_split"_a = plan.sums_split,
                  "sums_splits"_a = plan.sums_splits, "flat_rows"_a = plan.flat_rows, "flat_pieces"_a = plan.flat_pieces,
                  "flat_unit_rows"_a = plan.flat_unit_rows, "flat_row_vector"_a = plan.flat_row_vector,
                  "flat_lanes"_a = plan.flat_lanes, "cluster"_a = plan.cluster, "backward_cluster"_a = plan.backward_cluster);
}

py::dict plan(const std::string& device, int64_t channels, int64_t positions, int64_t element_size, bool channels_last,
              bool aligned, const Decisions& tuning) {
  if (channels < 1 || positions < 1 || element_size < 1) {
    throw py::value_error("channels, positions and element_size must be at least 1, got " + std::to_string(channels) + ", " +
                          std::to_string(positions) + " and " + std::to_string(element_size));
  }
  if (device == "cpu") return plan_cpu(channels, positions, element_size, channels_last);
  if (device == "cuda") return plan_cuda(channels, positions, element_size, channels_last, aligned, tuning);
  throw py::value_error("device must be 'cpu' or 'cuda', got '" + device + "'");
}

int64_t plan_cuda_lag(int64_t sample_bytes, int64_t samples, int64_t item_bytes, const Decisions& tuning) {
  if (sample_bytes < 0 || samples < 0 || item_bytes < 1) {
    throw py::value_error("sample_bytes and samples must be at least 0, and item_bytes at least 1");
  }
  return gcnet_ext_plan_cuda_lag(sample_bytes, samples, item_bytes, tuning.data());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  require_same_version();
  m.doc() = "What was built and how it decides; the operators are in torch.ops.gcnet_ext.";
  m.def("build_info", &build_info, "What was compiled: version, torch, compiler, OpenMP, CPU capabilities.");
  m.def("cpu_capability", &cpu_capability, "The vector instructions in use, by their name in usable_capabilities().");
  m.def(
      "usable_capabilities", [] { return listed(gcnet_ext_usable_capability); },
      "The capabilities that this processor can run, best first.");
  static PyMethodDef class_version{"class_version", &gcnet_ext::class_version, METH_O,
                                   "A number that changes with the attributes of a class and its bases, or 0."};
  m.add_object("class_version", py::reinterpret_steal<py::object>(PyCFunction_New(&class_version, nullptr)));
  static PyMethodDef unchanged{
      "unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&gcnet_ext::unchanged)), METH_FASTCALL,
      "The fields of objects that are asked for, if none of what was recorded has changed; else None."};
  m.add_object("unchanged", py::reinterpret_steal<py::object>(PyCFunction_New(&unchanged, nullptr)));
  m.def(
      "past_caches", [](int64_t bytes) { return gcnet_ext_past_caches(bytes) != 0; },
      "Whether the CPU kernels write an output past the caches, in a call that goes through maps of so many bytes.", "bytes"_a);
  m.def("plan", &plan, "How the kernels of a device cut the attention pool of a sample of [C, P] elements.", "device"_a,
        "channels"_a, "positions"_a, "element_size"_a = 4, "channels_last"_a = false, "aligned"_a = true,
        "tuning"_a = Decisions{});
  m.def("plan_cuda_lag", &plan_cuda_lag,
        "How many items of its first stage the last stage of a sample stays behind in a ticketed launch.", "sample_bytes"_a,
        "samples"_a, "item_bytes"_a, "tuning"_a = Decisions{});
}
