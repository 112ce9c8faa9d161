// Every loop of one capability, compiled. Included last by csrc/cpu/kernels_<capability>.cpp.
#pragma once

#include "table.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

inline const Kernels kTable{
    .map_double = kMap<double>,
    .map_float = kMap<float>,
    .map_half = kMap<Half>,
    .map_bfloat16 = kMap<BFloat16>,
    .vector_double = kVector<double>,
    .vector_float = kVector<float>,
    .matrix_double_double = kMatrix<double, double>,
    .matrix_float_float = kMatrix<float, float>,
    .matrix_float_half = kMatrix<float, Half>,
    .matrix_float_bfloat16 = kMatrix<float, BFloat16>,
};

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
