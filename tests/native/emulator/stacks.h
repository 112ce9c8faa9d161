// The stacks that emulated threads run on, and who these are for ThreadSanitizer.
#pragma once

#include <sys/mman.h>

#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace gcnet_ext::cuda::emulation {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;
constexpr size_t kBlocksAtATime = 3;  // in the round-robin schedule

// The stacks of the threads of a block, and who they are for ThreadSanitizer. Both are costly to make, half a millisecond a
// thread, so blocks hand them on to later blocks, as late as possible: two blocks that share them count as ordered, but any
// block is unordered with the kBlocksAtATime - 1 or more that started before it.
class StackSets {
 public:
  // Thread number i of a block that has this set of stacks.
  void create(Fiber& fiber, size_t set, size_t i, void (*entry)()) {
    std::vector<Member>& members = sets_[set];
    while (members.size() <= i) members.push_back({new_stack(), nullptr});
    if (under_thread_sanitizer() && !members[i].identity) members[i].identity = __tsan_create_fiber(0);
    create_fiber(fiber, members[i].stack, kStackBytes, members[i].identity, entry);
  }

  // A launch that failed left them in the middle of something. What they did until then comes before what they release.
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

  // Above a page that nobody may touch.
  static char* new_stack() {
    void* start = mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* stack = static_cast<char*>(start) + kGuardBytes;
    if (start == MAP_FAILED || mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE)) {
      throw std::runtime_error("no memory for the stacks of the emulated threads");
    }
    return stack;
  }

  std::vector<Member> sets_[kBlocksAtATime];
};

}  // namespace gcnet_ext::cuda::emulation
