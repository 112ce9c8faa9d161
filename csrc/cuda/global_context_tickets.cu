// The kernels of the forward pass in one launch, in a file of their own because they take long to compile.
#include "global_context_tickets.cuh"

namespace gcnet_ext::cuda {

GCNET_EXT_COMPILED_HERE(launch_global_context_tickets)

}  // namespace gcnet_ext::cuda
