#include "threads.h"

#include <omp.h>

#include "../stable.h"

namespace gcnet_ext::cpu {

int64_t torch_threads() { return torch::stable::get_num_threads(); }

bool in_parallel_region() { return omp_in_parallel(); }

void run_on_threads(int64_t threads, const void* body, void (*call)(const void* body, int64_t rank, int64_t count)) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  call(body, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace gcnet_ext::cpu
