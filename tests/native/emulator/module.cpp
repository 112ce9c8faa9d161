// The Python module of the emulated operators, and the parts of torch that only a GPU has: a current stream and a current
// device. (Linked with -Bsymbolic, so that the glue finds these and not torch's.)
#include <pybind11/pybind11.h>

#include "cuda_emulation.h"

extern "C" {

__attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
__attribute__((visibility("default"))) int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
__attribute__((visibility("default"))) int32_t aoti_torch_delete_device_guard(void*) { return 0; }

}  // extern "C"

namespace py = pybind11;
using namespace py::literals;
namespace emulation = gcnet_ext::cuda::emulation;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The CUDA kernels on the CPU; the operators are in torch.ops.gcnet_ext_emulated.";
  m.def("count_accesses", &emulation::count_accesses, "Counts the accesses of kernels from now on; or no longer.", "count"_a);
  m.def("launches", &emulation::launches, "The launches of kernels so far.");
  m.def(
      "traffic",
      [](uintptr_t address, size_t bytes) {
        const auto found = emulation::traffic_of(reinterpret_cast<const void*>(address), bytes);
        return py::dict("loads"_a = py::make_tuple(found.least_loads, found.most_loads),
                        "stores"_a = py::make_tuple(found.least_stores, found.most_stores));
      },
      "How often the bytes of a buffer were loaded and stored: the least and the most of any byte.", "address"_a, "bytes"_a);
}
