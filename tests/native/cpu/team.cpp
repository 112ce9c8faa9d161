// The threads of the CPU kernels for the sanitizer tests: std::thread, whose start and end every sanitizer knows. (libgomp's
// barriers are not instrumented: ThreadSanitizer would take every hand-over for a race.)
#include "../../../csrc/cpu/team.h"

#include <thread>
#include <vector>

#include "team.h"

namespace gcnet_ext::cpu {
namespace {

int64_t wanted_threads = 1;
thread_local bool member = false;

}  // namespace

void set_threads(int64_t threads) { wanted_threads = threads; }
int64_t torch_threads() { return wanted_threads; }
bool in_team() { return member; }

void run_team(int64_t threads, const void* body, void (*call)(const void* body, int64_t rank, int64_t team)) {
  std::vector<std::thread> crew;
  for (int64_t rank = 0; rank < threads; rank++) {
    crew.emplace_back([=] {
      member = true;
      call(body, rank, threads);
    });
  }
  for (std::thread& each : crew) each.join();
}

}  // namespace gcnet_ext::cpu
