// The stacks that emulated threads run on, and the threads' identities for ThreadSanitizer.
#pragma once

#include <sys/mman.h>

#include <stdexcept>
#include <vector>

#include "cuda_emulation.h"
#include "fiber.h"

namespace gcnet_ext::cuda::emulation {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;
constexpr size_t kClustersAtATime = 3;  // in the round-robin schedule

// A set has a stack and an identity for each thread of a block. Making them takes half a millisecond per thread, so a block
// hands its set on to a later block. ThreadSanitizer takes two blocks with one set for ordered; therefore a set is handed on as
// late as possible, and any block is unordered with those of the kClustersAtATime - 1 or more clusters that started before it.
class StackSets {
 public:
  // Makes the fiber of thread number i in a block that has this set.
  void create(Fiber& fiber, size_t set, size_t i, void (*entry)()) {
    std::vector<Member>& members = sets_[set];
    while (members.size() <= i) members.push_back({new_stack(), nullptr});
    if (under_thread_sanitizer() && !members[i].identity) members[i].identity = __tsan_create_fiber(0);
    create_fiber(fiber, members[i].stack, kStackBytes, members[i].identity, entry);
  }

  // To be called after a launch that failed, whose threads stopped in the middle of their work. All that they did comes before
  // the release of `released`.
  void reset(const Fiber& host, void* released) {
    for (std::vector<Member>& members : sets_) {
      for (Member& member : members) {
        forget_stack(member.stack, kStackBytes);
        if (!member.identity) continue;
        __tsan_switch_to_fiber(member.identity, kNoSync);
        sanitizer_release(released);
        __tsan_switch_to_fiber(host.tsan, kNoSync);
        __tsan_destroy_fiber(member.identity);
        member.identity = nullptr;
      }
    }
  }

 private:
  struct Member {
    char* stack;
    void* identity;
  };

  // A new stack, above a page that nobody may touch.
  static char* new_stack() {
    void* start = mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* stack = static_cast<char*>(start) + kGuardBytes;
    if (start == MAP_FAILED || mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE)) {
      throw std::runtime_error("no memory for the stacks of the emulated threads");
    }
    return stack;
  }

  std::vector<Member> sets_[kClustersAtATime * kLargestCluster];
};

}  // namespace gcnet_ext::cuda::emulation
