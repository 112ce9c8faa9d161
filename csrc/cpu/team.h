// The threads of the CPU kernels: OpenMP's, as many as torch has. Apart from the loops that use them (parallel.h), so that the
// sanitizer tests can put threads in their place that a sanitizer understands (tests/native/cpu/team.cpp).
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

namespace gcnet_ext::cpu {

// torch.get_num_threads()
int64_t torch_threads();
// Whether the caller is one of several threads already.
bool in_team();
// call(body, rank, team) by each of at most `threads` threads; team is how many there are.
void run_team(int64_t threads, const void* body, void (*call)(const void* body, int64_t rank, int64_t team));

// body(rank, team). What a thread throws (its memory may run out) reaches the caller.
template <typename Body>
void run_team(int64_t threads, const Body& body) {
  std::exception_ptr thrown;
  std::mutex first;
  const auto guarded = [&](int64_t rank, int64_t team) {
    try {
      body(rank, team);
    } catch (...) {
      const std::lock_guard lock(first);
      if (!thrown) thrown = std::current_exception();
    }
  };
  run_team(threads, &guarded, [](const void* function, int64_t rank, int64_t team) {
    (*static_cast<const decltype(guarded)*>(function))(rank, team);
  });
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace gcnet_ext::cpu
