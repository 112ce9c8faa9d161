// The loops of one capability, listed; what is taken from the lists is compiled. Included last by kernels_<capability>.cpp.
#pragma once

#include "activation.h"
#include "attention_pool.h"
#include "channel_fuse.h"
#include "simd.h"
#include "transform.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

template <typename scalar_t>
constexpr MapKernels<scalar_t> kMap{
    .attention_pool = attention_pool<scalar_t>,
    .attention_pool_backward = attention_pool_backward<scalar_t>,
    .position_dots = position_dots<scalar_t>,
    .channel_dots = channel_dots<scalar_t>,
    .pool_gradient = pool_gradient<scalar_t>,
    .channel_fuse = channel_fuse<scalar_t>,
    .relu_backward = relu_backward<scalar_t>,
    .channel_sums = channel_sums<scalar_t>,
};
template <typename acc>
constexpr VectorKernels<acc> kVector{
    .softmax = softmax<acc>,
    .softmax_of_sum = softmax_of_sum<acc>,
    .logit_gradient = logit_gradient<acc>,
    .context_dot = context_dot<acc>,
    .moments = moments<acc>,
    .sigmoid = sigmoid<acc>,
    .activation = activation<acc>,
    .activation_gradient = activation_gradient<acc>,
};
template <typename acc, typename weight_t>
constexpr MatrixKernels<acc, weight_t> kMatrix{
    .linear = linear<acc, weight_t>,
    .linear_backward_input = linear_backward_input<acc, weight_t>,
    .linear_backward_weight = linear_backward_weight<acc, weight_t>,
};

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
