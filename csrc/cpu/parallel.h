// Parallel loops, and how samples are grouped.
#pragma once

#include <algorithm>
#include <cstdint>

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

// body(i) for 0 <= i < count, each thread with a row of neighbours. The items and what each of them computes depend on the
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

// How samples of so many bytes are grouped, if each group reads so many bytes of weights.
inline GroupPlan plan_groups(int64_t samples, int64_t sample_bytes, int64_t weight_bytes) {
  return plan_cpu_group(samples, sample_bytes, weight_bytes, torch_threads());
}

// body(first, count) for groups of samples. Either the threads share the work on one group after the other, or each thread
// takes groups of its own through all steps.
template <typename Body>
void for_each_group(const GroupPlan& plan, int64_t samples, int64_t elements, const Body& body) {
  const auto groups = [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += plan.samples) body(first, std::min(plan.samples, end - first));
  };
  return plan.per_thread ? parallel_ranges(samples, elements, groups) : groups(0, samples);
}

}  // namespace gcnet_ext::cpu
