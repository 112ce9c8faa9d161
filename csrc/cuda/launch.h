// Launches of kernels, on a GPU or in the emulator, in grids that fit; the workspace of a call; and the tuning of its plans.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "../plan_cuda.h"
#include "cuda_or_emulator.h"

#if defined(__CUDACC__)
#include <atomic>
#include <stdexcept>
#endif

// The kernels of a launch are compiled in one file, for all types: the .cu that has GCNET_EXT_COMPILED_HERE(launch). For all
// others that include the launch, GCNET_EXT_COMPILED_ELSEWHERE(launch) stands below its definition.
#define GCNET_EXT_FOR_EACH_TYPE(linkage, function)              \
  linkage template decltype(function<double>) function<double>; \
  linkage template decltype(function<float>) function<float>;   \
  linkage template decltype(function<Half>) function<Half>;     \
  linkage template decltype(function<BFloat16>) function<BFloat16>;
#define GCNET_EXT_COMPILED_ELSEWHERE(function) GCNET_EXT_FOR_EACH_TYPE(extern, function)
#define GCNET_EXT_COMPILED_HERE(function) GCNET_EXT_FOR_EACH_TYPE(, function)

namespace gcnet_ext::cuda {

// The error on a GPU for which these architectures have no code.
inline std::string no_code_for(int major, int minor, const std::string& architectures) {
  const std::string gpu = std::to_string(major) + "." + std::to_string(minor);
  return "gcnet_ext: this GPU has compute capability " + gpu + ", and the CUDA kernels were compiled for " + architectures +
         " only; build them again with TORCH_CUDA_ARCH_LIST=" + gpu + " (see Install in README.md)";
}

#if defined(__CUDACC__)

[[noreturn]] inline void launch_failed(cudaError_t error) {
  int device = 0, major = 0, minor = 0;
  const bool without_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  if (without_code && !cudaGetDevice(&device) && !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) &&
      !cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) {
    throw std::runtime_error(no_code_for(major, minor, GCNET_EXT_CUDA_ARCHITECTURES));
  }
  throw std::runtime_error(std::string("gcnet_ext: CUDA launch failed: ") + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Arguments&&>(arguments)...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) launch_failed(error);
}

// The __CUDA_ARCH__ / 10 of the code that runs on the current device, the same for all kernels of this library; 0 if nobody can
// tell. (The driver may compile code for an older architecture for a newer one, and that has no newer instructions.)
inline int code_architecture(const void* any_kernel) {
  static std::atomic<int> known[64];  // of each device: 0 if nobody has asked yet
  int device = 0;
  if (cudaGetDevice(&device) || device >= 64) return 0;
  if (!known[device]) {
    cudaFuncAttributes code{};
    if (cudaFuncGetAttributes(&code, any_kernel)) return 0;
    known[device] = code.ptxVersion;
  }
  return known[device];
}
template <class... Parameters>
int code_architecture(void (*kernel)(Parameters...)) {
  return code_architecture(reinterpret_cast<const void*>(kernel));
}

// A launch with an attribute, if it applies.
template <class... Parameters, class... Arguments>
void launch_with(cudaLaunchAttribute& attribute, bool applies, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                 size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = applies ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) launch_failed(error);
}

// A launch whose blocks may start before the launch before it is over, from sm_90 on; see wait_for_previous_launch().
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                  Arguments&&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  launch_with(early, code_architecture(kernel) >= 90, kernel, grid, block, shared_bytes, stream, arguments...);
}

// A launch in which so many neighbouring blocks run together and reach the shared memory of each other (cluster.cuh). More than
// one needs sm_90. The grid is a multiple of that number.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute clusters{};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  launch_with(clusters, cluster > 1, kernel, grid, block, shared_bytes, stream, arguments...);
}

inline int attribute_of_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const cudaError_t found = cudaGetDevice(&device);
  const cudaError_t error = found ? found : cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("gcnet_ext: no CUDA device: ") + cudaGetErrorString(error));
  return value;
}

// The multiprocessors of the current device.
inline int multiprocessors() { return attribute_of_device(cudaDevAttrMultiProcessorCount); }
// The shared memory of a block, and of a multiprocessor, for launches that ask for more than every kernel gets.
inline size_t most_shared_bytes() { return attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline size_t shared_bytes_of_multiprocessor() { return attribute_of_device(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }
inline size_t second_level_cache_bytes() { return attribute_of_device(cudaDevAttrL2CacheSize); }

// Lets a kernel have this much shared memory on the current device.
template <class... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= kCudaSharedBytes) return;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) launch_failed(error);
}

inline void zero_async(void* start, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(start, 0, bytes, stream);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("gcnet_ext: cudaMemsetAsync failed: ") + cudaGetErrorString(error));
}

#else  // emulation

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  emulation::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                  Arguments&&... arguments) {
  emulation::run(grid, block, shared_bytes, [&] { kernel(arguments...); }, {.early = true});
}

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                     Arguments&&... arguments) {
  emulation::run(grid, block, shared_bytes, [&] { kernel(arguments...); }, {.cluster = static_cast<unsigned>(cluster)});
}

template <class... Parameters>
int code_architecture(void (*)(Parameters...)) {
  return 90;
}

inline int multiprocessors() { return emulation::multiprocessors(); }
template <class... Parameters>
void allow_shared_bytes(void (*)(Parameters...), size_t bytes) {
  emulation::allow_shared_bytes(bytes);
}
inline size_t most_shared_bytes() { return emulation::kMostSharedBytes; }
inline size_t shared_bytes_of_multiprocessor() { return emulation::kMostSharedBytes; }
inline size_t second_level_cache_bytes() { return 50 << 20; }

inline void zero_async(void* start, size_t bytes, cudaStream_t) { std::memset(start, 0, bytes); }

#endif

// The blocks that run at a time, up to so many on each multiprocessor if their shared memory allows it.
inline int64_t blocks_at_a_time(int of_multiprocessor, size_t shared_bytes) {
  constexpr size_t kReserved = 1 << 10;  // what the system takes of every block's shared memory
  const auto fit = static_cast<int64_t>(shared_bytes_of_multiprocessor() / (shared_bytes + kReserved));
  return multiprocessors() * std::max<int64_t>(1, std::min<int64_t>(of_multiprocessor, fit));
}

// Calls launch_range once for as many samples as a grid can hold, until all samples are done.
template <typename Params, typename Launch>
void for_sample_ranges(Params params, int64_t blocks_per_sample, const Launch& launch_range) {
  const int64_t samples = params.extent.samples, most = std::max<int64_t>(1, kCudaMaxBlocks / blocks_per_sample);
  for (int64_t first = 0; first < samples; first += most) {
    params.first_sample = first;
    launch_range(params, dim3(static_cast<unsigned>(std::min(most, samples - first) * blocks_per_sample)));
  }
}

// What this thread has decided in the place of the plan functions (tuning.cu).
inline CudaTuning& tuning() {
  static thread_local CudaTuning decided{};
  return decided;
}

// Memory for one call, valid until its launches are done.
class Workspace {
 public:
  virtual ~Workspace() = default;

  template <typename Value>
  Value* take(int64_t count) {
    return static_cast<Value*>(allocate(std::max<int64_t>(count, 1) * sizeof(Value)));
  }
  unsigned* zeros(int64_t count, cudaStream_t stream) {
    unsigned* counters = take<unsigned>(count);
    if (count > 0) zero_async(counters, count * sizeof(unsigned), stream);
    return counters;
  }

 private:
  virtual void* allocate(size_t bytes) = 0;
};

}  // namespace gcnet_ext::cuda
