// The loops over blocks of x of one capability, listed. Included last by csrc/cpu/kernels_<capability>.cpp, alone or by
// table.h.
#pragma once

#include "attention_pool.h"
#include "channel_fuse.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

template <typename scalar_t>
constexpr MapKernels<scalar_t> kMap{attention_pool<scalar_t>, attention_pool_backward<scalar_t>, position_dots<scalar_t>,
                                    channel_dots<scalar_t>,   pool_gradient<scalar_t>,           channel_fuse<scalar_t>,
                                    channel_sums<scalar_t>};

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
