// The threads of the CPU kernels for the sanitizer tests: std::thread, whose start and end every sanitizer knows. (libgomp's
// barriers are not instrumented: ThreadSanitizer would take every hand-over for a race.)
#include "../../../csrc/cpu/threads.h"

#include <thread>
#include <vector>

#include "team.h"

namespace gcnet_ext::cpu {
namespace {

int64_t wanted_threads = 1, regions = 0;
thread_local bool in_parallel = false;

}  // namespace

void set_threads(int64_t threads) { wanted_threads = threads; }
int64_t parallel_regions() { return regions; }
int64_t torch_threads() { return wanted_threads; }
bool in_parallel_region() { return in_parallel; }

void run_on_threads(int64_t threads, const void* body, void (*call)(const void* body, int64_t rank, int64_t count)) {
  regions++;
  std::vector<std::thread> started;
  for (int64_t rank = 0; rank < threads; rank++) {
    started.emplace_back([=] {
      in_parallel = true;
      call(body, rank, threads);
    });
  }
  for (std::thread& each : started) each.join();
}

}  // namespace gcnet_ext::cpu
