// What the sanitizer tests add to csrc/cpu/threads.h.
#pragma once

#include <cstdint>

namespace gcnet_ext::cpu {

// What torch_threads() answers from now on.
void set_threads(int64_t threads);
// How often threads were started and waited for so far.
int64_t parallel_regions();

}  // namespace gcnet_ext::cpu
