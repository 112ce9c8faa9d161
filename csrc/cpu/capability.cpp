#include "capability.h"

#include <cstdlib>
#include <stdexcept>

#include "kernels/table.h"

namespace gcnet_ext::cpu {
namespace {

struct Capability {
  const char* name;
  const Kernels& (*kernels)();
  bool (*runs_here)();
};

#if defined(__x86_64__)
// F16C is not asked for, because clang 14 does not know its name. Every processor with AVX2 and FMA has it.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// What is compiled for this kind of processor, the best first.
constexpr Capability kCapabilities[] = {
#if defined(__x86_64__)
    {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
    {"avx512", kernels_avx512, has_avx512},
    {"avx2", kernels_avx2, has_avx2},
#endif
    {"default", kernels_default, [] { return true; }},
};

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Capability& pick() {
  const char* wanted = std::getenv("GCNET_EXT_CPU_CAPABILITY");
  for (const Capability& candidate : kCapabilities) {
    if (candidate.runs_here() && (wanted == nullptr || *wanted == '\0' || std::string(wanted) == candidate.name))
      return candidate;
  }
  throw std::runtime_error("GCNET_EXT_CPU_CAPABILITY must be one of " + listed(usable_capabilities()) +
                           " on this machine, got " + wanted);
}

const Capability& in_use() {
  static const Capability& picked = pick();
  return picked;
}

}  // namespace

std::string capability() { return in_use().name; }

std::vector<std::string> compiled_capabilities() {
  std::vector<std::string> names;
  for (const Capability& candidate : kCapabilities) names.emplace_back(candidate.name);
  return names;
}

std::vector<std::string> usable_capabilities() {
  std::vector<std::string> names;
  for (const Capability& candidate : kCapabilities) {
    if (candidate.runs_here()) names.emplace_back(candidate.name);
  }
  return names;
}

const Kernels& kernels() { return in_use().kernels(); }

}  // namespace gcnet_ext::cpu
