// Launches of kernels, on a GPU or in the emulator, in grids that fit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <type_traits>

#include "../plan_cuda.h"
#include "cuda_or_emulator.h"

#if defined(__CUDACC__)
#include <stdexcept>
#endif

// The kernels of a launch are compiled once, in the .cu file of one operator. What includes the launch elsewhere finds it declared
// by GCNET_EXT_COMPILED_ELSEWHERE(launch), below its definition, and that one file has GCNET_EXT_COMPILED_HERE(launch).
#define GCNET_EXT_FOR_EACH_TYPE(linkage, function)              \
  linkage template decltype(function<double>) function<double>; \
  linkage template decltype(function<float>) function<float>;   \
  linkage template decltype(function<Half>) function<Half>;     \
  linkage template decltype(function<BFloat16>) function<BFloat16>;
#define GCNET_EXT_COMPILED_ELSEWHERE(function) GCNET_EXT_FOR_EACH_TYPE(extern, function)
#define GCNET_EXT_COMPILED_HERE(function) GCNET_EXT_FOR_EACH_TYPE(, function)

namespace gcnet_ext::cuda {

// What is said on a GPU that the kernels, compiled for these architectures, have no code for.
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

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  const cudaError_t found = cudaGetDevice(&device);
  const cudaError_t error = found ? found : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("gcnet_ext: no CUDA device: ") + cudaGetErrorString(error));
  return count;
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

inline int multiprocessors() { return 1; }

inline void zero_async(void* start, size_t bytes, cudaStream_t) { std::memset(start, 0, bytes); }

#endif

// Launches for as many samples at a time as a grid can hold.
template <typename Params, typename Launch>
void for_sample_ranges(Params params, int64_t blocks_per_sample, const Launch& launch_range) {
  const int64_t samples = params.extent.samples, most = std::max<int64_t>(1, kCudaMaxBlocks / blocks_per_sample);
  for (int64_t first = 0; first < samples; first += most) {
    params.first_sample = first;
    launch_range(params, dim3(static_cast<unsigned>(std::min(most, samples - first) * blocks_per_sample)));
  }
}

}  // namespace gcnet_ext::cuda
