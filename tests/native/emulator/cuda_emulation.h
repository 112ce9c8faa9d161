// Runs CUDA device code on the CPU, under g++: every CUDA thread is a fiber of its own, and the fibers of a launch take turns
// on the calling thread. csrc/cuda/cuda_or_emulator.h includes this in place of <cuda_runtime.h>.
//
// What it finds that a GPU would hide:
//   * barriers, shuffles and votes that not all threads reach together, and deadlocks: an exception that says who waits where;
//   * accesses through load and store that are not aligned to their size: an exception as well;
//   * threads that wait for a counter which nobody will raise: an exception, after nobody has got on for long;
//   * shared memory that nobody wrote: it is filled with NaN, and so is the target of a copy until the thread waits for it, and
//     the memory of a block that has ended;
//   * under AddressSanitizer, accesses past the end of shared or global memory: shared memory has its exact size;
//   * under ThreadSanitizer, data races: only __syncthreads, __syncwarp, launches and atomics order memory, nothing else.
//
// GCNET_EMULATION_SCHEDULE=depth-first (the default: a block at a time, a warp as far as it can go), round-robin (several
// blocks at a time, every thread one step), and GCNET_EMULATION_SEED=n (n > 0: blocks and threads in random order) choose who
// runs next. A correct kernel gives the same bits under all of them. GCNET_EMULATION_DROP is for tests/native/mutate.py:
// "file:line" makes the barrier or wait in that line do nothing, "file:line:acquire" and "file:line:release" take that half from the
// atomic or the wait there.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "take shared memory from dynamic_shared_memory()");

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

namespace gcnet_ext::cuda::emulation {

using Site = std::source_location;

struct Indices {
  dim3 thread, block;
};

// The indices of the thread that runs now, and the sizes of its launch.
extern const Indices* indices;
extern dim3 block_size, grid_size;

struct Options {
  // A GPU may start this launch before the launch before it is over. Here it does not, but a thread breaks a rule that loads
  // something fresh before it has waited for that launch, or that ends without having waited.
  bool early = false;
  unsigned cluster = 1;  // so many neighbouring blocks run together and reach the shared memory of each other
};
constexpr unsigned kLargestCluster = 4;

// Runs body(closure) once per thread and returns when all are done. Throws std::runtime_error when a thread broke a rule.
void run(dim3 grid, dim3 block, size_t shared_bytes, const Options& options, void (*body)(const void*), const void* closure);

template <class Body>
void run(dim3 grid, dim3 block, size_t shared_bytes, const Body& body, const Options& options = {}) {
  const auto call = [](const void* closure) { (*static_cast<const Body*>(closure))(); };
  run(grid, block, shared_bytes, options, call, std::addressof(body));
}

// The launches so far.
int64_t launches();

// Lets the next launch have this much shared memory, where a launch gets 48 KB by itself.
void allow_shared_bytes(size_t bytes);

// Lets others run: what a thread does that waits for a counter.
void yield(Site site);

// The block's number in its cluster, the address in the shared memory of another block of the cluster that `own` is in that of
// this one, and the barrier of all threads of the cluster.
unsigned cluster_rank();
void* shared_of_rank(void* own, unsigned rank);
void cluster_barrier(Site site);

void waited(Site site);
void note_fresh_load();

// The multiprocessors of the GPU that is emulated: GCNET_EMULATION_MULTIPROCESSORS, or one.
int multiprocessors();
constexpr size_t kMostSharedBytes = 227 << 10;  // of a block, or of the blocks of a multiprocessor, after an opt-in

// A copy that is made when the thread waits for it. Until then its target is NaN. Without a `from`, zeros are copied.
void copy_later(void* to, const void* from, size_t bytes);
// Takes this thread's oldest copy off its list; false if there is none.
bool next_copy(void** to, const void** from, size_t* bytes);
// Whether GCNET_EMULATION_DROP names this place.
bool dropped(Site site);

unsigned char* shared_memory();
void barrier(Site site);

// The lanes of a warp that are in the mask meet here. Every lane brings a value; a shuffle returns that of the source lane, and
// a ballot returns the votes of all.
enum class Meeting { barrier, shuffle, ballot };
uint64_t meet(Meeting what, unsigned mask, uint64_t value, unsigned source_lane, Site site);
unsigned lane();

// The memory order of an atomic that acquires and releases, unless GCNET_EMULATION_DROP takes half of it.
int acq_rel(Site site);

// Starts or stops to count every access through load and store. (This does not work under ThreadSanitizer, which takes the
// memory of the counts for that of the threads.)
void count_accesses(bool count);
// How often the bytes of a buffer were loaded and stored, as the least and the most of any byte.
struct Traffic {
  unsigned least_loads, most_loads, least_stores, most_stores;
};
Traffic traffic_of(const void* start, size_t bytes);

void note_load(const void* from, size_t bytes);
void note_store(const void* to, size_t bytes);

template <class T>
T shuffle(unsigned mask, T value, unsigned source_lane, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(Meeting::shuffle, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace gcnet_ext::cuda::emulation

#define threadIdx (::gcnet_ext::cuda::emulation::indices->thread)
#define blockIdx (::gcnet_ext::cuda::emulation::indices->block)
#define blockDim (::gcnet_ext::cuda::emulation::block_size)
#define gridDim (::gcnet_ext::cuda::emulation::grid_size)

inline void __syncthreads(gcnet_ext::cuda::emulation::Site site = gcnet_ext::cuda::emulation::Site::current()) {
  gcnet_ext::cuda::emulation::barrier(site);
}

inline void __syncwarp(unsigned mask = ~0u,
                       gcnet_ext::cuda::emulation::Site site = gcnet_ext::cuda::emulation::Site::current()) {
  gcnet_ext::cuda::emulation::meet(gcnet_ext::cuda::emulation::Meeting::barrier, mask, 0, 0, site);
}

inline unsigned __ballot_sync(unsigned mask, bool vote,
                              gcnet_ext::cuda::emulation::Site site = gcnet_ext::cuda::emulation::Site::current()) {
  return gcnet_ext::cuda::emulation::meet(gcnet_ext::cuda::emulation::Meeting::ballot, mask, vote, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              gcnet_ext::cuda::emulation::Site site = gcnet_ext::cuda::emulation::Site::current()) {
  const int lane = gcnet_ext::cuda::emulation::lane();
  return gcnet_ext::cuda::emulation::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  gcnet_ext::cuda::emulation::Site site = gcnet_ext::cuda::emulation::Site::current()) {
  const int lane = gcnet_ext::cuda::emulation::lane(), source = lane ^ lane_mask;
  return gcnet_ext::cuda::emulation::shuffle(mask, value, (source | (width - 1)) > (lane | (width - 1)) ? lane : source, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   gcnet_ext::cuda::emulation::Site site = gcnet_ext::cuda::emulation::Site::current()) {
  const unsigned lane = gcnet_ext::cuda::emulation::lane(), last = lane | (width - 1);
  return gcnet_ext::cuda::emulation::shuffle(mask, value, lane + delta > last ? lane : lane + delta, site);
}

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
