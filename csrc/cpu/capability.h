// Which of the compiled kernels this processor runs.
#pragma once

#include <string>
#include <vector>

namespace gcnet_ext::cpu {

// "default", "avx2", "avx512" or "avx512_bf16": the best that was compiled and that the processor has, or what
// GCNET_EXT_CPU_CAPABILITY asks for. Throws std::runtime_error when that is unknown or not to be had here.
std::string capability();
// The capabilities that were compiled into this library, and those of them that this processor can run.
std::vector<std::string> compiled_capabilities();
std::vector<std::string> usable_capabilities();

}  // namespace gcnet_ext::cpu
