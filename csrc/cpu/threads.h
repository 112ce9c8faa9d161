// The threads of the CPU kernels: OpenMP's, as many as torch has. The loops that use them are in parallel.h, so that the
// sanitizer tests can replace the threads by some that a sanitizer understands (tests/native/cpu/team.cpp).
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

namespace gcnet_ext::cpu {

// torch.get_num_threads()
int64_t torch_threads();
// Whether the caller is one of several threads that run the same body.
bool in_parallel_region();
// call(body, rank, count) by each of at most `threads` threads; count is how many there are.
void run_on_threads(int64_t threads, const void* body, void (*call)(const void* body, int64_t rank, int64_t count));

// body(rank, count). What a thread throws (its memory may run out) reaches the caller.
template <typename Body>
void run_on_threads(int64_t threads, const Body& body) {
  std::exception_ptr thrown;
  std::mutex first;
  const auto guarded = [&](int64_t rank, int64_t count) {
    try {
      body(rank, count);
    } catch (...) {
      const std::lock_guard lock(first);
      if (!thrown) thrown = std::current_exception();
    }
  };
  run_on_threads(threads, &guarded, [](const void* function, int64_t rank, int64_t count) {
    (*static_cast<const decltype(guarded)*>(function))(rank, count);
  });
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace gcnet_ext::cpu
