// The running maximum and sum of a softmax whose logits come tile by tile.
#pragma once

#include "numbers.cuh"

namespace gcnet_ext::cuda {

// The exponents of a softmax are taken relative to its maximum; or to zero as long as all logits are -inf, because -inf - -inf
// would be NaN. (When they all stay -inf, the sum stays 0 and the division by it gives the NaN of the definition.)
template <typename A>
__device__ __forceinline__ A softmax_reference(A maximum) {
  return maximum == lowest<A>() ? A(0) : maximum;
}

// The maximum of the logits so far, and the sum of exp(logit - maximum).
template <typename A>
struct OnlineSoftmax {
  A maximum = lowest<A>(), sum = A(0);

  // Raises the maximum if tile_maximum is larger, rescales sum, and returns the factor with which the caller must rescale all
  // other running sums. The caller then adds exp(logit - reference()) of the tile's logits to sum.
  __device__ A raise_maximum(A tile_maximum) {
    const A raised = larger(maximum, tile_maximum);
    const A rescale = exponential(maximum - softmax_reference(raised));
    maximum = raised;
    sum *= rescale;
    return rescale;
  }
  __device__ A reference() const { return softmax_reference(maximum); }
};

}  // namespace gcnet_ext::cuda
