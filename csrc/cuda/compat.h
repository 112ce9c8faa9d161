// The few words that device code needs beyond C++: nvcc supplies them on a GPU, tests/native/cuda_emulation.h under g++, where
// the same kernels run thread by thread on the CPU. Every access to a big tensor goes through load and store, so that the
// emulator can check its alignment and count its bytes.
#pragma once

#include <cstddef>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <stdexcept>
#else
#include "cuda_emulation.h"
#endif

namespace gcnet_ext::cuda {

// V neighbours that travel as one access; as wide as it is aligned.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T data[V];
};

// What is said on a GPU that the kernels, compiled for these architectures, have no code for.
inline std::string no_code_for(int major, int minor, const std::string& architectures) {
  const std::string gpu = std::to_string(major) + "." + std::to_string(minor);
  return "gcnet_ext: this GPU has compute capability " + gpu + ", and the CUDA kernels were compiled for " + architectures +
         " only; build them again with TORCH_CUDA_ARCH_LIST=" + gpu + " (see Install in README.md)";
}

#if defined(__CUDACC__)

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char gcnet_ext_shared_memory[];
  return gcnet_ext_shared_memory;
}

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

// What a vector of so many bytes travels as. An assignment would do, but the compiler takes that apart where it likes, into
// four stores of 4 bytes; __stwb, a store like any other, stays whole.
template <size_t kBytes>
struct Access;
template <>
struct Access<32> {
  struct alignas(32) type {
    uint4 halves[2];
  };
};
template <>
struct Access<16> {
  using type = uint4;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<4> {
  using type = unsigned;
};
template <>
struct Access<2> {
  using type = unsigned short;
};

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load_vector(const T* from) {
  using Word = typename Access<sizeof(T) * V>::type;
  return __builtin_bit_cast(Vector<T, V>, *reinterpret_cast<const Word*>(from));
}

template <class T, int V>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, V>& value) {
  using Word = typename Access<sizeof(T) * V>::type;
  __stwb(reinterpret_cast<Word*>(to), __builtin_bit_cast(Word, value));
}

template <class T>
__device__ __forceinline__ T load(const T* from) {
  return *from;
}

// Asks the second-level cache for what will be loaded later.
template <class T>
__device__ __forceinline__ void prefetch(const T* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

template <class T>
__device__ __forceinline__ void store(T* to, T value) {
  *to = value;
}

// What another block wrote in this launch: past the first-level cache, and never through the read-only path.
template <class T>
__device__ __forceinline__ T load_fresh(const T* from) {
  return __ldcg(from);
}

// One thread speaks for its block: everything before the __syncthreads() before it is released, and everything that the blocks
// counted so far released is acquired for what follows the __syncthreads() after it.
__device__ __forceinline__ unsigned fetch_add_acq_rel(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// Orders nothing; an atomic only because a plain store would formally race with the additions of other blocks.
__device__ __forceinline__ unsigned exchange_relaxed(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.exch.relaxed.gpu.b32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// Makes the compiler forget where a value came from, for one instruction per word. Between two uses of a tile held in registers
// this keeps the narrow form alive; otherwise the converted floats are kept instead, twice the registers, and spilled. (An
// empty asm is not enough: ptxas sees through it.)
template <class Value>
__device__ __forceinline__ void hide_from_optimizer(Value& value) {
  if constexpr (sizeof(Value) % sizeof(unsigned) == 0) {
    unsigned* words = reinterpret_cast<unsigned*>(&value);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Value) / sizeof(unsigned)); i++)
      asm volatile("lop3.b32 %0, %0, %0, %0, 0xaa;" : "+r"(words[i]));
  }
}

#else  // emulation

inline unsigned char* dynamic_shared_memory() { return emulation::shared_memory(); }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  emulation::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

inline int multiprocessors() { return 1; }

inline void zero_async(void* start, size_t bytes, cudaStream_t) { std::memset(start, 0, bytes); }

template <int V, class T>
Vector<T, V> load_vector(const T* from) {
  emulation::note_load(from, sizeof(T) * V);
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <class T, int V>
void store_vector(T* to, const Vector<T, V>& value) {
  emulation::note_store(to, sizeof(T) * V);
  *reinterpret_cast<Vector<T, V>*>(to) = value;
}

template <class T>
void prefetch(const T*) {}

template <class T>
T load(const T* from) {
  emulation::note_load(from, sizeof(T));
  return *from;
}

template <class T>
void store(T* to, T value) {
  emulation::note_store(to, sizeof(T));
  *to = value;
}

template <class T>
T load_fresh(const T* from) {
  return *from;
}

inline unsigned fetch_add_acq_rel(unsigned* counter, unsigned value, emulation::Site site = emulation::Site::current()) {
  switch (emulation::acq_rel(site)) {
    case __ATOMIC_ACQUIRE: return __atomic_fetch_add(counter, value, __ATOMIC_ACQUIRE);
    case __ATOMIC_RELEASE: return __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
    default: return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
  }
}

inline unsigned exchange_relaxed(unsigned* counter, unsigned value) {
  return __atomic_exchange_n(counter, value, __ATOMIC_RELAXED);
}

template <class Value>
void hide_from_optimizer(Value&) {}

#endif

}  // namespace gcnet_ext::cuda
