// Every loop of one capability, compiled and listed. Included last by csrc/cpu/kernels_<capability>.cpp.
#pragma once

#include "map_table.h"
#include "transform.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

template <typename acc>
constexpr VectorKernels<acc> kVector{softmax<acc>,     softmax_of_sum<acc>, logit_gradient<acc>,
                                     context_dot<acc>, moments<acc>,        sigmoid<acc>};
template <typename acc, typename weight_t>
constexpr MatrixKernels<acc, weight_t> kMatrix{linear<acc, weight_t>, linear_backward_input<acc, weight_t>,
                                               linear_backward_weight<acc, weight_t>};

inline const Kernels kTable{kMap<double>,
                            kMap<float>,
                            kMap<Half>,
                            kMap<BFloat16>,
                            kVector<double>,
                            kVector<float>,
                            kMatrix<double, double>,
                            kMatrix<float, float>,
                            kMatrix<float, Half>,
                            kMatrix<float, BFloat16>};

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
