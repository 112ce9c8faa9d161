// Every loop of one capability, compiled. Included last by csrc/cpu/kernels_<capability>.cpp.
#pragma once

#include "table.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

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
