#include "team.h"

#include <omp.h>

#include "../stable.h"

namespace gcnet_ext::cpu {

int64_t torch_threads() { return torch::stable::get_num_threads(); }

bool in_team() { return omp_in_parallel(); }

void run_team(int64_t threads, const void* body, void (*call)(const void* body, int64_t rank, int64_t team)) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  call(body, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace gcnet_ext::cpu
