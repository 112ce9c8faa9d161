// The shared memory of a kernel is described by one struct. Its constructor takes the pieces one after the other: on the device this
// gives the pointers, and on the host, where the launch asks for the size, it only counts.
//
//   template <typename A>
//   struct ExampleShared {
//     A *sums, *totals;
//     template <typename Memory>
//     __host__ __device__ ExampleShared(Memory& memory, int64_t channels) {
//       memory.take(sums, kWarp);
//       memory.take(totals, channels);
//     }
//   };
//   const auto shared = shared_memory<ExampleShared<A>>(channels);               // in the kernel
//   launch(kernel, grid, block, shared_bytes<ExampleShared<A>>(channels), ...);  // on the host
#pragma once

#include <cstddef>
#include <cstdint>

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
class SharedMemory {
 public:
  __device__ SharedMemory() : next_(dynamic_shared_memory()) {}

  template <typename Value>
  __host__ __device__ void take(Value*& piece, int64_t count) {
    piece = reinterpret_cast<Value*>(next_);
    next_ += piece_bytes<Value>(count);
  }

 private:
  unsigned char* next_;
};

// Counts the bytes of the pieces, in the place of a block's memory.
struct SharedSize {
  size_t bytes = 0;

  template <typename Value>
  __host__ __device__ void take(Value*& piece, int64_t count) {
    piece = nullptr;
    bytes += piece_bytes<Value>(count);
  }
};

// The pieces of this block's shared memory.
template <typename Shared, typename... Sizes>
__device__ __forceinline__ Shared shared_memory(const Sizes&... sizes) {
  SharedMemory memory;
  return Shared(memory, sizes...);
}

// How much of it they take.
template <typename Shared, typename... Sizes>
size_t shared_bytes(const Sizes&... sizes) {
  SharedSize size;
  Shared(size, sizes...);
  return size.bytes;
}

}  // namespace gcnet_ext::cuda
