// The decisions of gcnet_ext.cuda_tuning, which take the place of the plan functions.
#pragma once

#include "../plan_cuda.h"

namespace gcnet_ext::cuda {

// The decisions of this thread (tuning.cu).
inline CudaTuning& tuning() {
  static thread_local CudaTuning decided{};
  return decided;
}

}  // namespace gcnet_ext::cuda
