// The ticketed launch of the backward pass, compiled beside the launches that it takes the place of.
#include "global_context_backward_tickets.cuh"

namespace gcnet_ext::cuda {

GCNET_EXT_COMPILED_HERE(launch_backward_tickets)

}  // namespace gcnet_ext::cuda
