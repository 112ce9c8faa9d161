// Sweeps over samples of a feature map that other ops use too.
#pragma once

#include "tensors.h"

namespace gcnet_ext::cpu {

// out = x*scale + shift for samples first <= n < first + count. scale and shift are [N, C] and may be null.
template <typename scalar_t>
void fuse_samples(const Map<const scalar_t>& x, const acc_t<scalar_t>* scale, const acc_t<scalar_t>* shift, int64_t first,
                  int64_t count, const Map<scalar_t>& out);

// sum_a[n, c] = sum_p a_ncp and sum_ab[n, c] = sum_p a_ncp b_ncp for those samples; either sum may be null.
template <typename scalar_t>
void sum_samples(const Map<const scalar_t>& a, const Map<const scalar_t>& b, int64_t first, int64_t count,
                 acc_t<scalar_t>* sum_a, acc_t<scalar_t>* sum_ab);

}  // namespace gcnet_ext::cpu
