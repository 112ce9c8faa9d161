// How device code reaches memory: loads, stores, prefetches and atomics. Every access to a big tensor goes through these loads
// and stores, so that the emulator can check its alignment and count its bytes.
#pragma once

#include <cstddef>

#include "cuda_or_emulator.h"

namespace gcnet_ext::cuda {

// V neighbours in memory that are loaded or stored by one access, which is aligned to its size.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T data[V];
};

#if defined(__CUDACC__)

// The type in which a vector of kBytes bytes is accessed. An assignment of the vector would do, but the compiler takes some of
// those apart, into four stores of 4 bytes; __stwb, otherwise a store like any other, stays whole.
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

// Asks the second-level cache for memory that will be loaded later.
template <class T>
__device__ __forceinline__ void prefetch(const T* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

template <class T>
__device__ __forceinline__ void store(T* to, T value) {
  *to = value;
}

// Loads a value that another block may have written in this launch, or in an earlier one that this launch overlaps: past the
// first-level cache, and never through the read-only path.
template <class T>
__device__ __forceinline__ T load_fresh(const T* from) {
  return __ldcg(from);
}

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load_fresh_vector(const T* from) {
  using Word = typename Access<sizeof(T) * V>::type;
  return __builtin_bit_cast(Vector<T, V>, __ldcg(reinterpret_cast<const Word*>(from)));
}

// What the second-level cache forgets first: an ordinary access leaves it to the cache, and one to what nobody needs again may
// say so, if `enabled`.
struct Eviction {
  unsigned long long policy = 0;

  __device__ static Eviction first(bool enabled) {
    Eviction eviction;
#if __CUDA_ARCH__ >= 800
    if (enabled) {
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(eviction.policy));
    } else {
      asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(eviction.policy));
    }
#endif
    return eviction;
  }
};

// Starts to copy one access of 16 bytes to shared memory, or zeros in its place if it is not wanted. The thread may read it after
// wait_for_copies(), and no other thread may without a barrier after that. Before sm_80 the copy is done at once.
template <class T, int V>
__device__ __forceinline__ void copy_later(Vector<T, V>* to, const T* from, bool wanted) {
  static_assert(sizeof(*to) == 16);
#if __CUDA_ARCH__ >= 800
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(wanted ? 16 : 0) : "memory");
#else
  *to = {};
  if (wanted) *to = load_vector<V>(from);
#endif
}

template <class T, int V>
__device__ __forceinline__ void copy_later(Vector<T, V>* to, const T* from, bool wanted, const Eviction& eviction) {
#if __CUDA_ARCH__ >= 800
  static_assert(sizeof(*to) == 16);
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(from),
               "r"(wanted ? 16 : 0), "l"(eviction.policy)
               : "memory");
#else
  copy_later(to, from, wanted);
#endif
}

// Stores what nobody needs again soon: the caches forget it before everything else.
template <class T, int V>
__device__ __forceinline__ void store_once(T* to, const Vector<T, V>& value) {
  using Word = typename Access<sizeof(T) * V>::type;
  __stcs(reinterpret_cast<Word*>(to), __builtin_bit_cast(Word, value));
}

// Waits until the copies that this thread has started are done.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Every thread of a kernel that launch_early() starts calls this before it reads what the previous launch wrote. It calls it once
// even if it reads nothing of that: otherwise this launch could end before the previous one does, and the next launch, which
// waits for this one alone, would read what is not written yet.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From now on, the blocks of the next launch may start where this launch leaves room, if launch_early() starts them.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// One thread calls this for its block, between two __syncthreads(). It releases everything that the block wrote before the
// first, and acquires, for everything after the second, whatever the blocks that were counted so far have released.
__device__ __forceinline__ unsigned fetch_add_acq_rel(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// Adds one to a counter that orders nothing else, and returns what it was.
__device__ __forceinline__ unsigned draw(unsigned* counter) {
  unsigned before;
  asm volatile("atom.add.relaxed.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// One thread calls this for its block, behind a __syncthreads(). It releases everything that the block wrote before that.
__device__ __forceinline__ void add_release(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Waits until add_release() has raised a counter to `count`. One thread calls this for its block, in front of a __syncthreads(),
// after which the block sees everything that was released. If nothing comes within two seconds, the launch fails: a mistake must
// not occupy a GPU for ever.
__device__ __forceinline__ void wait_for_count(const unsigned* counter, unsigned count) {
  constexpr unsigned long long kLongest = 2'000'000'000;  // ns
  unsigned long long begin = 0;
#pragma unroll 1
  for (unsigned round = 1;; round++) {
    unsigned found;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    if (found >= count) return;
    __nanosleep(64);
    if (round % 1024) continue;
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    if (begin == 0) begin = now;
    if (now - begin > kLongest) __trap();
  }
}

// This orders no other access. It is an atomic because a plain store would formally race with the additions of other blocks.
__device__ __forceinline__ unsigned exchange_relaxed(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.exch.relaxed.gpu.b32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// Makes the compiler forget where a value came from, at the price of one instruction per word. Between two uses of a tile in
// registers this keeps the narrow numbers alive. Without it the compiler keeps the floats that they were widened to, in twice
// the registers, and spills them. (An empty asm is not enough, because ptxas sees through it.)
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
  emulation::note_fresh_load();
  return *from;
}

template <int V, class T>
Vector<T, V> load_fresh_vector(const T* from) {
  emulation::note_fresh_load();
  return load_vector<V>(from);
}

template <class T, int V>
void copy_later(Vector<T, V>* to, const T* from, bool wanted) {
  static_assert(sizeof(*to) == 16);
  if (wanted) emulation::note_load(from, sizeof(*to));
  emulation::copy_later(to, wanted ? from : nullptr, sizeof(*to));
}

struct Eviction {
  static Eviction first(bool) { return {}; }
};
template <class T, int V>
void copy_later(Vector<T, V>* to, const T* from, bool wanted, const Eviction&) {
  copy_later(to, from, wanted);
}
template <class T, int V>
void store_once(T* to, const Vector<T, V>& value) {
  store_vector(to, value);
}

inline void wait_for_copies(emulation::Site site = emulation::Site::current()) {
  if (emulation::dropped(site)) return;
  void* to;
  const void* from;
  size_t bytes;
  while (emulation::next_copy(&to, &from, &bytes)) {  // the copy is made here, where a sanitizer sees it
    for (size_t i = 0; i < bytes; i++) static_cast<char*>(to)[i] = from ? static_cast<const char*>(from)[i] : 0;
  }
}

inline void wait_for_previous_launch(emulation::Site site = emulation::Site::current()) { emulation::waited(site); }
inline void let_next_launch_start() {}

inline unsigned fetch_add_acq_rel(unsigned* counter, unsigned value, emulation::Site site = emulation::Site::current()) {
  switch (emulation::acq_rel(site)) {
    case __ATOMIC_ACQUIRE: return __atomic_fetch_add(counter, value, __ATOMIC_ACQUIRE);
    case __ATOMIC_RELEASE: return __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
    default: return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
  }
}

inline unsigned draw(unsigned* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

inline void add_release(unsigned* counter, unsigned value, emulation::Site site = emulation::Site::current()) {
  const bool releases = emulation::acq_rel(site) != __ATOMIC_ACQUIRE;
  __atomic_fetch_add(counter, value, releases ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
}

inline void wait_for_count(const unsigned* counter, unsigned count, emulation::Site site = emulation::Site::current()) {
  if (emulation::dropped(site)) return;
  const bool acquires = emulation::acq_rel(site) != __ATOMIC_RELEASE;
  while (__atomic_load_n(counter, acquires ? __ATOMIC_ACQUIRE : __ATOMIC_RELAXED) < count) emulation::yield(site);
}

inline unsigned exchange_relaxed(unsigned* counter, unsigned value) {
  return __atomic_exchange_n(counter, value, __ATOMIC_RELAXED);
}

template <class Value>
void hide_from_optimizer(Value&) {}

#endif

}  // namespace gcnet_ext::cuda
