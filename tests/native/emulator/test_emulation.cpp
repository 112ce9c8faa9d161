// Tests of the emulator itself, with small kernels that are right, and small kernels that are wrong in one way each.
//
//   test_emulation                runs all checks that an exception can report
//   test_emulation NAME           runs one kernel whose mistake only a sanitizer sees; it must stop the program
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cuda/cluster.cuh"
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/memory_access.h"
#include "../../../csrc/cuda/shared_memory.cuh"

using namespace gcnet_ext::cuda;

namespace {

constexpr unsigned kAll = ~0u;
constexpr int kThreads = 96;
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

__device__ float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared_memory()); }

__device__ float warp_sum(float value) {
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// Sums of kThreads values per block, merged by the block that arrives last.
struct Sum {
  const float* x;
  float* partials;
  unsigned* arrived;
  float* out;
  bool barrier = true, acquire_release = true;
};

__global__ void sum_kernel(Sum p) {
  float* sums = shared_floats();
  const float sum = warp_sum(load(p.x + blockIdx.x * kThreads + threadIdx.x));
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (p.barrier) __syncthreads();
  if (threadIdx.x != 0) return;
  p.partials[blockIdx.x] = sums[0] + sums[1] + sums[2];
  const unsigned before =
      p.acquire_release ? fetch_add_acq_rel(p.arrived, 1u) : __atomic_fetch_add(p.arrived, 1u, __ATOMIC_RELAXED);
  if (before != gridDim.x - 1) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; i++) total += load_fresh(p.partials + i);
  store(p.out, total);
  exchange_relaxed(p.arrived, 0u);
}

float sum_of_blocks(unsigned blocks, bool barrier = true, bool acquire_release = true) {
  std::vector<float> x(blocks * kThreads), partials(blocks);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i % 7);
  unsigned arrived = 0;
  float out = 0;
  launch(sum_kernel, dim3(blocks), dim3(kThreads), 3 * sizeof(float), nullptr,
         Sum{x.data(), partials.data(), &arrived, &out, barrier, acquire_release});
  if (arrived != 0) throw std::runtime_error("the counter was not put back to zero");
  return out;
}

__global__ void neighbour_kernel(float* out, bool barrier) {
  float* values = shared_floats();
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncwarp();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 32];
}

__global__ void warp_operations_kernel(double* out) {
  const int lane = threadIdx.x;
  const unsigned even = __ballot_sync(kAll, lane % 2 == 0);
  const double down = __shfl_down_sync(kAll, static_cast<double>(lane), 4, 8);
  const double from_third = __shfl_sync(kAll, static_cast<double>(lane), 3, 16);
  // The halves of a warp may go separate ways, each with its own mask.
  const double swapped = lane < 16 ? __shfl_xor_sync(0xffffu, static_cast<double>(lane), 1)
                                   : __shfl_xor_sync(0xffff0000u, static_cast<double>(lane), 2);
  out[lane] =
      even == 0x55555555u && down == (lane % 8 < 4 ? lane + 4 : lane) && from_third == lane / 16 * 16 + 3 ? swapped : -1;
}

__global__ void overrun_kernel(float* out, int floats) {
  float* values = shared_floats();
  if (static_cast<int>(threadIdx.x) == floats) values[floats] = 1;
  out[threadIdx.x] = 0;
}
__global__ void uninitialised_kernel(float* out) { *out = shared_floats()[0]; }
__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void missing_lane_kernel() {
  if (threadIdx.x != 5) __syncwarp();
}
__global__ void two_masks_kernel() { __shfl_xor_sync(threadIdx.x < 16 ? 0x1ffffu : kAll, 1.f, 1); }
__global__ void outside_mask_kernel() {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1.f, 16);
}
__global__ void misaligned_kernel(const float* x) { load_vector<4>(x + 1); }
__global__ void early_kernel(const float* fresh, bool waits_first, bool waits) {
  if (waits_first) wait_for_previous_launch();
  if (fresh) load_fresh(fresh);
  if (waits) wait_for_previous_launch();
}
__global__ void late_copy_kernel(const float* x, float* out, bool waits) {
  auto* const stage = reinterpret_cast<Vector<float, 4>*>(shared_floats());
  copy_later(stage, x, true);
  copy_later(stage + 1, x, false);
  if (waits) wait_for_copies();
  out[0] = stage[0].data[3];
  out[1] = stage[1].data[0];
}
__global__ void endless_copies_kernel(const float* x) {
  for (int i = 0; i < 1000; i++) copy_later(reinterpret_cast<Vector<float, 4>*>(shared_floats()), x, true);
}
// A block waits for the one behind it, or for itself.
__global__ void waiting_kernel(unsigned* counters, float* values, float* out, bool itself, bool releases) {
  const unsigned next = itself ? blockIdx.x : blockIdx.x + 1;
  if (next < gridDim.x) {
    wait_for_count(counters + next, 1);
    out[blockIdx.x] = load_fresh(values + next);
  }
  values[blockIdx.x] = static_cast<float>(blockIdx.x);
  if (releases) {
    add_release(counters + blockIdx.x, 1);
  } else {
    draw(counters + blockIdx.x);
  }
}
// The blocks of a cluster read the shared memory of each other.
__global__ void cluster_kernel(float* out, bool barrier, unsigned rank) {
  float* const own = shared_floats();
  *own = static_cast<float>(cluster_rank());
  if (barrier) cluster_barrier();
  out[blockIdx.x] = *shared_of_rank(own, rank == kAll ? cluster_rank() ^ 1 : rank);
  cluster_barrier();
}
// The first block of a cluster reads the shared memory of the second one when that has ended.
__global__ void late_kernel(unsigned* ended) {
  if (cluster_rank() == 1) return add_release(ended, 1);
  wait_for_count(ended, 1);
  shared_of_rank(shared_floats(), 1);
}
__global__ void empty_kernel() {}
__global__ void copy_kernel(const float* x, float* out, int count) {
  const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) store_vector(out + i, load_vector<2>(x + i));
}

int failures = 0;

void check(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what);
  failures++;
}

void check_throws(const std::function<void()>& run, const char* expected) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).find(expected) == std::string::npos) {
      std::printf("FAILED: expected '%s', got '%s'\n", expected, error.what());
      failures++;
    }
    return;
  }
  std::printf("FAILED: nothing was thrown, expected '%s'\n", expected);
  failures++;
}

void everything() {
  std::vector<float> out(kThreads);
  std::vector<double> doubles(32);
  for (unsigned blocks : {1u, 2u, 9u}) {
    float expected = 0;
    for (unsigned i = 0; i < blocks * kThreads; i++) expected += static_cast<float>(i % 7);
    check(sum_of_blocks(blocks) == expected, "sum, merged by the last block");
  }
  launch(neighbour_kernel, 1, 32, 32 * sizeof(float), nullptr, out.data(), true);
  for (int i = 0; i < 32; i++) check(out[i] == static_cast<float>((i + 1) % 32), "the neighbour's value after __syncwarp");
  launch(warp_operations_kernel, 1, 32, 0, nullptr, doubles.data());
  for (int i = 0; i < 32; i++) check(doubles[i] == (i < 16 ? i ^ 1 : i ^ 2), "shuffles and votes");
  launch(uninitialised_kernel, 1, 1, sizeof(float), nullptr, out.data());
  check(out[0] != out[0], "shared memory starts as NaN");

  alignas(16) const float source[4] = {1, 2, 3, 4};
  launch(late_copy_kernel, 1, 1, 32, nullptr, source, out.data(), true);
  check(out[0] == 4 && out[1] == 0, "a copy is there after the wait, and zeros are in the place of one that is not wanted");
  launch(late_copy_kernel, 1, 1, 32, nullptr, source, out.data(), false);
  check(out[0] != out[0] && out[1] != out[1], "a copy is NaN before the wait");
  check_throws([&] { launch(endless_copies_kernel, 1, 1, 16, nullptr, source); }, "copies that nobody waits for");
  allow_shared_bytes(empty_kernel, 50000);
  launch(empty_kernel, 1, 32, 50000, nullptr);

  for (const int cluster : {2, 4}) {
    launch_clusters(cluster_kernel, cluster, dim3(8), 1, sizeof(float), nullptr, out.data(), true, kAll);
    for (int i = 0; i < 8; i++)
      check(out[i] == static_cast<float>(i % cluster ^ 1), "the shared memory of the neighbour in a cluster");
  }
  check_throws([&] { launch_clusters(cluster_kernel, 2, dim3(2), 1, 4, nullptr, out.data(), true, 2u); },
               "shared memory of rank 2 in a cluster of 2");
  check_throws([&] { launch_clusters(empty_kernel, 2, dim3(3), 1, 4, nullptr); }, "no multiple of the cluster");
  unsigned ended = 0;
  check_throws([&] { launch_clusters(late_kernel, 2, dim3(2), 1, 4, nullptr, &ended); }, "which has ended");
  std::vector<float> values(3);
  std::vector<unsigned> counters(3);
  launch_clusters(waiting_kernel, 3, dim3(3), 1, 0, nullptr, counters.data(), values.data(), out.data(), false, true);
  check(out[0] == 1 && out[1] == 2, "blocks wait for a counter");
  counters.assign(3, 0);
  check_throws([&] { launch(waiting_kernel, 3, 1, 0, nullptr, counters.data(), values.data(), out.data(), true, true); },
               "nobody gets on while this thread waits");

  check_throws([] { launch(divergent_barrier_kernel, 1, 64, 0, nullptr); }, "thread 0,0,0 on: waits at the __syncthreads");
  check_throws([] { launch(two_barriers_kernel, 1, 64, 0, nullptr); }, "while others wait at the one in line");
  check_throws([] { launch(missing_lane_kernel, 2, 32, 0, nullptr); }, "thread 5,0,0 on: exited");
  check_throws([] { launch(two_masks_kernel, 1, 32, 0, nullptr); }, "name another mask");
  check_throws([] { launch(outside_mask_kernel, 1, 32, 0, nullptr); }, "which is not in the mask");
  check_throws(
      [&] { launch(misaligned_kernel, 1, 1, 0, nullptr, out.data() + 4 - reinterpret_cast<uintptr_t>(out.data()) % 16 / 4); },
      "not aligned");
  const float* const fresh = out.data();
  launch_early(early_kernel, 1, 32, 0, nullptr, fresh, true, false);
  launch(early_kernel, 1, 32, 0, nullptr, fresh, false, false);
  check_throws([&] { launch_early(early_kernel, 1, 32, 0, nullptr, fresh, false, true); }, "before a load of what it may have");
  check_throws([] { launch_early(early_kernel, 1, 32, 0, nullptr, nullptr, false, false); }, "before its end");
  check_throws([] { launch(empty_kernel, dim3(0), 32, 0, nullptr); }, "an empty grid");
  check_throws([] { launch(empty_kernel, dim3(1, 1 << 16), 32, 0, nullptr); }, "the grid is too large");
  check_throws([] { launch(empty_kernel, 1, 1025, 0, nullptr); }, "the block is too large");
  check_throws([] { launch(empty_kernel, 1, 32, 50000, nullptr); }, "more than 48 KB");
  check(sum_of_blocks(2) > 0, "a launch after failed ones");

  check(no_code_for(12, 0, "8.0;9.0") ==
            "gcnet_ext: this GPU has compute capability 12.0, and the CUDA kernels were compiled for 8.0;9.0 only; build them "
            "again with TORCH_CUDA_ARCH_LIST=12.0 (see Install in README.md)",
        "a GPU without code is named, with what there is code for and what to do");
}

void counting() {
  alignas(16) float source[70] = {}, copy[70];
  emulation::count_accesses(true);
  launch(copy_kernel, 2, 32, 0, nullptr, source, copy, 68);
  const auto read = emulation::traffic_of(source, sizeof(source)), written = emulation::traffic_of(copy, sizeof(copy));
  emulation::count_accesses(false);
  check(read.least_loads == 0 && read.most_loads == 1 && read.most_stores == 0, "loads are counted");
  check(written.least_stores == 0 && written.most_stores == 1 && written.most_loads == 0, "stores are counted");
}

// The mistakes of these kernels show under a sanitizer only.
const std::map<std::string, std::function<void()>> silent = {
    {"missing-syncthreads", [] { sum_of_blocks(1, false); }},
    {"missing-acquire-release", [] { sum_of_blocks(3, true, false); }},
    {"missing-release",
     [] {
       std::vector<float> values(3), out(3);
       std::vector<unsigned> counters(3);
       launch_clusters(waiting_kernel, 3, dim3(3), 1, 0, nullptr, counters.data(), values.data(), out.data(), false, false);
     }},
    {"missing-cluster-barrier",
     [] {
       float out[2];
       launch_clusters(cluster_kernel, 2, dim3(2), 1, sizeof(float), nullptr, out, false, 0u);
     }},
    {"missing-syncwarp",
     [] {
       float out[32];
       launch(neighbour_kernel, 1, 32, sizeof(out), nullptr, out, false);
     }},
    {"shared-overrun",
     [] {
       float out[32];
       launch(overrun_kernel, 1, 32, 5 * sizeof(float), nullptr, out, 5);
     }},
};

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    silent.at(arguments[1])();
    return 0;
  }
  everything();
  if (!kThreadSanitizer) counting();
  std::printf("%d failed\n", failures);
  return failures != 0;
}
