// OpenMP loops that take their number of threads from torch.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "../stable.h"

namespace gcnet_ext::cpu {

constexpr int64_t kSerialElements = 16384;  // below, waking a thread costs more than it saves

inline int64_t torch_threads() { return torch::stable::get_num_threads(); }

// body(i) for 0 <= i < count, on as many threads as torch has. The items and what each of them computes depend on the shape
// alone, so the result does not depend on who computes them. `elements` is the size of the whole loop's work. Inside another
// parallel region the loop is serial.
template <typename Body>
void parallel_for(int64_t count, int64_t elements, const Body& body) {
  const int64_t threads = std::min(count, torch_threads());
  if (threads <= 1 || elements < kSerialElements || omp_in_parallel()) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t i = 0; i < count; i++) body(i);
}

}  // namespace gcnet_ext::cpu
