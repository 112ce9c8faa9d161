// gcnet_ext/_tuning.py calls this.
#include "launch.h"

// From now on, the calls of this thread follow these decisions.
extern "C" __attribute__((visibility("default"))) void gcnet_ext_cuda_tuning(const gcnet_ext::CudaTuning* decided) {
  gcnet_ext::cuda::tuning() = *decided;
}
