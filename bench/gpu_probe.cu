// What a GPU gives, apart from the kernels of this project: the figures that csrc/cuda is designed by, and bench/gpu_model.py too.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -o gpu_probe bench/gpu_probe.cu && ./gpu_probe probe.json
//
// Rates are GB/s, times are microseconds unless a name says nanoseconds. Each figure is the median of several calls, by events.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace {

constexpr size_t kMega = 1000000;
constexpr size_t kMost = 512 * kMega;  // bytes of each buffer
constexpr int kThreads = 256, kUnroll = 4, kRounds = 1000;
using Access = uint4;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "gpu_probe: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// ---- kernels -----------------------------------------------------------------------------------------------------------------

enum class Keep { normal, first, last };  // whether the second-level cache evicts an access like others, before or after them

__device__ Access load(const Access* address, Keep keep) {
  Access value;
#if __CUDA_ARCH__ >= 800
  if (keep != Keep::normal) {
    uint64_t policy;
    if (keep == Keep::first) {
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    } else {
      asm volatile("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
    }
    asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address), "l"(policy));
    return value;
  }
#endif
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// use(i, value) for every access i of a buffer, by all threads of a launch; a thread has kUnroll of them under way.
template <typename Use>
__device__ void for_each_access(const Access* from, int64_t count, Keep keep, const Use& use) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    Access values[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; j++) values[j] = load(from + i + j * step, keep);
#pragma unroll
    for (int j = 0; j < kUnroll; j++) use(i + j * step, values[j]);
  }
  for (; i < count; i += step) use(i, load(from + i, keep));
}

__device__ unsigned any_bit(const Access& value) { return value.x | value.y | value.z | value.w; }

// Reads everything; sink is only written in a case that does not occur, so that no load can be left out.
__global__ void read_all(const Access* from, int64_t count, Keep keep, unsigned* sink) {
  unsigned mixed = 0;
  for_each_access(from, count, keep, [&](int64_t, const Access& value) { mixed |= any_bit(value); });
  if (mixed == 0x12345678u) *sink = mixed;
}

__global__ void copy_all(const Access* from, Access* to, int64_t count, Keep keep) {
  for_each_access(from, count, keep, [&](int64_t i, const Access& value) { __stcs(to + i, value); });
}

// Reads a matrix of `rows` rows of `stride` accesses in tiles of all rows and `lanes` accesses: a block has one tile.
__global__ void read_tiles(const Access* from, int rows, int stride, int lanes, unsigned* sink) {
  unsigned mixed = 0;
  const int lane = threadIdx.x % lanes, step = kThreads / lanes;
  const int column = blockIdx.x * lanes + lane;
  if (column >= stride) return;
  const Access* tile = from + static_cast<int64_t>(blockIdx.y) * rows * stride + column;
  for (int row = threadIdx.x / lanes; row < rows; row += kUnroll * step) {
    Access values[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; j++) {
      values[j] = row + j * step < rows ? load(tile + static_cast<int64_t>(row + j * step) * stride, Keep::normal) : Access{};
    }
#pragma unroll
    for (int j = 0; j < kUnroll; j++) mixed |= any_bit(values[j]);
  }
  if (mixed == 0x12345678u) *sink = mixed;
}

// Two blocks write to each other in turn; a round is two hops.
__global__ void hop(unsigned* flags) {
#if __CUDA_ARCH__ >= 700
  unsigned* const mine = flags + 32 * blockIdx.x;
  unsigned* const theirs = flags + 32 * (1 - blockIdx.x);
  for (unsigned round = 1; round <= kRounds; round++) {
    if (blockIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(theirs) : "memory");
    unsigned seen = 0;
    while (seen < round) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(mine) : "memory");
    if (blockIdx.x == 1) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(theirs) : "memory");
  }
#endif
}

// One thread draws tickets, each when it knows the one before.
__global__ void tickets(unsigned* counter) {
  unsigned ticket = 0;
  for (int round = 0; round < kRounds; round++) ticket = atomicAdd(counter, 1 + (ticket & 1));
  counter[1] = ticket;
}

#if __CUDACC_VER_MAJOR__ >= 12
__global__ void cluster_barriers(unsigned* sink) {
#if __CUDA_ARCH__ >= 900
  for (int round = 0; round < kRounds; round++) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
#endif
  if (sink == nullptr) __trap();
}
#endif

// Nearly nothing, after what the launch before it wrote. With `dependent` it may start before that launch has ended.
__global__ void link(unsigned* values, bool dependent) {
#if __CUDA_ARCH__ >= 900
  if (dependent) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
  const int i = blockIdx.x * kThreads + threadIdx.x;
  values[i] += 1;
}

// ---- measuring ---------------------------------------------------------------------------------------------------------------

struct Gpu {
  cudaDeviceProp properties;
  cudaStream_t stream;
  cudaEvent_t begin, end;
  Access *a, *b;
  unsigned* words;

  Gpu() {
    check(cudaGetDeviceProperties(&properties, 0));
    check(cudaStreamCreate(&stream));
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    for (Access** buffer : {&a, &b}) {
      check(cudaMalloc(buffer, kMost));
      check(cudaMemset(*buffer, 0, kMost));
    }
    check(cudaMalloc(&words, kMega));
    check(cudaMemset(words, 0, kMega));
    check(cudaDeviceSynchronize());
  }

  int blocks() const { return properties.multiProcessorCount * (properties.maxThreadsPerMultiProcessor / kThreads); }

  // Microseconds of `call`, each time after `prepare`.
  double median(const std::function<void()>& prepare, const std::function<void()>& call, int calls = 15) const {
    std::vector<float> times(calls);
    for (float& time : times) {
      prepare();
      check(cudaEventRecord(begin, stream));
      call();
      check(cudaEventRecord(end, stream));
      check(cudaEventSynchronize(end));
      check(cudaGetLastError());
      check(cudaEventElapsedTime(&time, begin, end));
    }
    std::nth_element(times.begin(), times.begin() + calls / 2, times.end());
    return 1000.0 * times[calls / 2];
  }

  // Microseconds of what `record` launches, replayed as a graph.
  double of_graph(const std::function<void()>& prepare, const std::function<void()>& record) const {
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    record();
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&ready, graph, 0));
    check(cudaGraphLaunch(ready, stream));
    const double found = median(prepare, [&] { check(cudaGraphLaunch(ready, stream)); });
    check(cudaGraphExecDestroy(ready));
    check(cudaGraphDestroy(graph));
    return found;
  }

  void read(const Access* from, size_t bytes, Keep keep = Keep::normal) const {
    read_all<<<blocks(), kThreads, 0, stream>>>(from, bytes / sizeof(Access), keep, words);
  }
  void copy(const Access* from, Access* to, size_t bytes, Keep keep = Keep::normal) const {
    copy_all<<<blocks(), kThreads, 0, stream>>>(from, to, bytes / sizeof(Access), keep);
  }
  // Of the second-level cache: by stores, which have to be written back later on, or by loads. The call uses the first half.
  void flush_dirty() const { check(cudaMemsetAsync(b + kMost / sizeof(Access) / 2, 1, kMost / 2, stream)); }
  void flush_clean() const { read(b + kMost / sizeof(Access) / 2, kMost / 2); }
};

// ---- the report --------------------------------------------------------------------------------------------------------------

// A JSON object of names and figures, whole after every figure.
class Report {
 public:
  explicit Report(const char* path) : path_(path) {}

  void add(const std::string& name, double value) {
    char figure[32];
    std::snprintf(figure, sizeof(figure), "%.4g", value);
    std::printf("%-60s %s\n", name.c_str(), figure);
    lines_ += (lines_.empty() ? " \"" : ",\n \"") + name + "\": " + figure;
    std::FILE* file = std::fopen(path_, "w");
    if (file == nullptr) {
      std::fprintf(stderr, "gpu_probe: cannot write %s\n", path_);
      std::exit(1);
    }
    std::fprintf(file, "{\n%s\n}\n", lines_.c_str());
    std::fclose(file);
  }

 private:
  const char* path_;
  std::string lines_;
};

double rate(double bytes, double microseconds) { return bytes / microseconds / 1000; }  // GB/s

void bandwidths(const Gpu& gpu, Report& report) {
  for (size_t megabytes : {1, 2, 4, 8, 16, 25, 32, 50, 100, 200}) {
    const size_t bytes = megabytes * kMega;
    const std::string size = std::to_string(megabytes) + " MB";
    const auto nothing = [] {};
    const auto read = [&] { gpu.read(gpu.a, bytes); };
    const auto copy = [&] { gpu.copy(gpu.a, gpu.b, bytes); };
    report.add("read, hot, GB/s, " + size, rate(bytes, gpu.of_graph(nothing, read)));
    report.add("read, after a clean flush, GB/s, " + size, rate(bytes, gpu.of_graph([&] { gpu.flush_clean(); }, read)));
    report.add("copy, hot, GB/s, " + size, rate(2.0 * bytes, gpu.of_graph(nothing, copy)));
    report.add("copy, after a clean flush, GB/s, " + size, rate(2.0 * bytes, gpu.of_graph([&] { gpu.flush_clean(); }, copy)));
    report.add("copy, after a dirty flush, GB/s, " + size, rate(2.0 * bytes, gpu.of_graph([&] { gpu.flush_dirty(); }, copy)));
  }
}

// x is read, as much of something else is copied, and x is read again: how fast, if the cache is told what to keep.
void second_reading(const Gpu& gpu, Report& report) {
  struct Hints {
    const char* name;
    Keep x, other;
  };
  for (const Hints& hints : {Hints{"no hints", Keep::normal, Keep::normal}, Hints{"other evict_first", Keep::normal, Keep::first},
                             Hints{"x evict_last", Keep::last, Keep::normal},
                             Hints{"x evict_last, other evict_first", Keep::last, Keep::first}}) {
    for (size_t megabytes : {4, 8, 12, 16, 20, 24, 28, 32, 40}) {
      const size_t bytes = megabytes * kMega;
      const double time = gpu.median(
          [&] {
            gpu.flush_clean();
            gpu.read(gpu.a, bytes, hints.x);
            gpu.copy(gpu.a + kMost / sizeof(Access) / 2, gpu.b, bytes, hints.other);
          },
          [&] { gpu.read(gpu.a, bytes, hints.other); });
      report.add("second reading, " + std::string(hints.name) + ", GB/s, " + std::to_string(megabytes) + " MB",
                 rate(bytes, time));
    }
  }
}

void row_lengths(const Gpu& gpu, Report& report) {
  constexpr int kRows = 1024, kStride = 525, kSamples = 8;  // the rows of 8x1024x50x84 float16, in accesses
  for (int lanes : {2, 4, 8, 16, 32}) {
    const dim3 grid((kStride + lanes - 1) / lanes, kSamples);
    const double time = gpu.of_graph([&] { gpu.flush_clean(); }, [&] {
      read_tiles<<<grid, kThreads, 0, gpu.stream>>>(gpu.a, kRows, kStride, lanes, gpu.words);
    });
    report.add("tiles with rows of " + std::to_string(lanes * sizeof(Access)) + " bytes, GB/s",
               rate(double(kRows) * kStride * kSamples * sizeof(Access), time));
  }
}

void latencies(const Gpu& gpu, Report& report) {
  const auto clear = [&] { check(cudaMemsetAsync(gpu.words, 0, 1024, gpu.stream)); };
  const auto per_round = [&](double microseconds) { return 1000 * microseconds / kRounds; };
  report.add("hop of a flag, ns", per_round(gpu.median(clear, [&] { hop<<<2, 1, 0, gpu.stream>>>(gpu.words); })) / 2);
  report.add("ticket, ns", per_round(gpu.median(clear, [&] { tickets<<<1, 1, 0, gpu.stream>>>(gpu.words); })));
}

void launches(const Gpu& gpu, Report& report) {
  constexpr int kLinks = 20;
  const int blocks = gpu.properties.multiProcessorCount;
  const bool later = gpu.properties.major >= 9;
  for (bool dependent : {false, true}) {
    if (dependent && !later) continue;
    const auto chain = [&](int count) {
      return gpu.of_graph([] {}, [&] {
        for (int i = 0; i < count; i++) {
          cudaLaunchAttribute attribute{};
          attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
          attribute.val.programmaticStreamSerializationAllowed = 1;
          cudaLaunchConfig_t config{};
          config.gridDim = blocks;
          config.blockDim = kThreads;
          config.stream = gpu.stream;
          config.attrs = &attribute;
          config.numAttrs = dependent && i > 0 ? 1 : 0;
          check(cudaLaunchKernelEx(&config, link, gpu.words, dependent));
        }
      });
    };
    const double one = chain(1), many = chain(1 + kLinks);
    const std::string with = dependent ? " with programmatic dependent launch" : "";
    report.add("graph of one launch" + with + ", us", one);
    report.add("launch boundary" + with + ", us", (many - one) / kLinks);
  }
}

void clusters(const Gpu& gpu, Report& report) {
  if (gpu.properties.major < 9) return;
  for (unsigned size : {2u, 4u}) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = size;
    config.blockDim = kThreads;
    config.stream = gpu.stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    const double time = gpu.median([] {}, [&] { check(cudaLaunchKernelEx(&config, cluster_barriers, gpu.words)); });
    report.add("barrier of a cluster of " + std::to_string(size) + ", ns", 1000 * time / kRounds);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "gpu_probe: one argument is needed, the file for the report\n");
    return 2;
  }
  const Gpu gpu;
  Report report(arguments[1]);
  latencies(gpu, report);
  launches(gpu, report);
  clusters(gpu, report);
  row_lengths(gpu, report);
  second_reading(gpu, report);
  bandwidths(gpu, report);
}
