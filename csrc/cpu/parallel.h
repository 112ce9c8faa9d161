// Parallel loops, and how samples are grouped.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../layout.h"
#include "../plan_cpu.h"
#include "threads.h"

namespace gcnet_ext::cpu {

constexpr int64_t kSerialElements = 16384;  // for fewer elements, waking a thread costs more than it saves

enum class Order { forwards, backwards };

// body(begin, end) for parts of 0 <= i < count, on as many threads as torch has, one part each. What is computed for an i must
// not depend on its part. `elements` is the size of the whole loop's work. Inside another parallel region the loop is serial.
template <typename Body>
void parallel_ranges(int64_t count, int64_t elements, const Body& body) {
  const int64_t most = std::min(count, torch_threads());
  if (most <= 1 || elements < kSerialElements || in_parallel_region()) return body(0, count);
  run_on_threads(most, [&](int64_t rank, int64_t threads) { body(count * rank / threads, count * (rank + 1) / threads); });
}

// body(i) for 0 <= i < count; each thread takes consecutive i. The items and what each of them computes depend on the
// shape alone, so the result does not depend on who computes them. A loop that goes backwards starts with what the loop before
// it has left in the caches.
template <typename Body>
void parallel_for(int64_t count, int64_t elements, const Body& body, Order order = Order::forwards) {
  parallel_ranges(count, elements, [&](int64_t begin, int64_t end) {
    if (order == Order::forwards) {
      for (int64_t i = begin; i < end; i++) body(i);
    } else {
      for (int64_t i = end; i-- > begin;) body(i);
    }
  });
}

// body(first, count) for groups of the samples of a map. The call reads element_bytes for each element of the map, and
// weight_bytes for each group. Either the threads share the work on one group after the other, or each thread takes groups
// of its own through all steps.
template <typename Body>
void for_each_group(const Layout& layout, int64_t element_bytes, int64_t weight_bytes, const Body& body) {
  const int64_t samples = layout.samples, elements = layout.channels * layout.positions;
  const GroupPlan plan = plan_cpu_group(samples, elements * element_bytes, weight_bytes, torch_threads());
  const auto groups = [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += plan.samples) body(first, std::min(plan.samples, end - first));
  };
  return plan.per_thread ? parallel_ranges(samples, samples * elements, groups) : groups(0, samples);
}

}  // namespace gcnet_ext::cpu
