// What gcnet_ext/_tuning.py calls.
#include "tuning.h"

// The calls of this thread follow these decisions from now on.
extern "C" __attribute__((visibility("default"))) void gcnet_ext_cuda_tuning(const gcnet_ext::CudaTuning* decided) {
  gcnet_ext::cuda::tuning() = *decided;
}
