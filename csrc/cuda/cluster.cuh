// Clusters (sm_90 and later): a few neighbouring blocks run together and reach the shared memory of each other. A launch without
// clusters has clusters of one block, for which all of this does nothing.
#pragma once

#include "cuda_or_emulator.h"

namespace gcnet_ext::cuda {

#if defined(__CUDACC__)

// The number of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Where another block of the cluster has, in its shared memory, what `own` points to in the shared memory of this one. The other
// block must not have ended.
template <class Value>
__device__ __forceinline__ Value* shared_of_rank(Value* own, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  Value* other;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(rank));
  return other;
#else
  return own;
#endif
}

// All threads of the cluster meet here, and see afterwards what each of them has written before.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

#else  // emulation

inline unsigned cluster_rank() { return emulation::cluster_rank(); }

template <class Value>
Value* shared_of_rank(Value* own, unsigned rank) {
  return static_cast<Value*>(emulation::shared_of_rank(own, rank));
}

inline void cluster_barrier(emulation::Site site = emulation::Site::current()) { emulation::cluster_barrier(site); }

#endif

}  // namespace gcnet_ext::cuda
