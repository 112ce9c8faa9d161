// One struct describes the shared memory of a kernel: the kernel gets it by shared_memory(), and the launch gets its size by
// shared_bytes(). Its members are arrays; or, where sizes are known only at run time, they are pointers, which the constructor
// sets by memory.take(), one piece after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda_or_emulator.h"

namespace gcnet_ext::cuda {

#if defined(__CUDACC__)
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char gcnet_ext_shared_memory[];
  return gcnet_ext_shared_memory;
}
#else
inline unsigned char* dynamic_shared_memory() { return emulation::shared_memory(); }
#endif

// Every piece begins at a multiple of 16 bytes.
template <typename Value>
constexpr size_t piece_bytes(int64_t count) {
  return (count * sizeof(Value) + 15) / 16 * 16;
}

// Hands out the shared memory of this block.
struct SharedMemory {
  unsigned char* next;

  template <typename Value>
  __host__ __device__ void take(Value*& piece, int64_t count) {
    piece = reinterpret_cast<Value*>(next);
    next += piece_bytes<Value>(count);
  }
};

// Counts the bytes of the pieces on the host.
struct SharedSize {
  size_t bytes = 0;

  template <typename Value>
  __host__ __device__ void take(Value*&, int64_t count) {
    bytes += piece_bytes<Value>(count);
  }
};

// The struct of a kernel in the shared memory of this block.
template <typename Shared, typename... Sizes>
__device__ __forceinline__ decltype(auto) shared_memory(Sizes... sizes) {
  if constexpr (std::is_aggregate_v<Shared>) {
    return *reinterpret_cast<Shared*>(dynamic_shared_memory());
  } else {
    SharedMemory memory{dynamic_shared_memory()};
    return Shared(memory, sizes...);
  }
}

// The bytes of such a struct, for the launch.
template <typename Shared, typename... Sizes>
size_t shared_bytes(Sizes... sizes) {
  if constexpr (std::is_aggregate_v<Shared>) {
    return sizeof(Shared);
  } else {
    SharedSize memory;
    Shared(memory, sizes...);
    return memory.bytes;
  }
}

}  // namespace gcnet_ext::cuda
