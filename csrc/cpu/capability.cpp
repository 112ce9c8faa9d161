#include "capability.h"

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace gcnet_ext::cpu {
namespace {

struct Capability {
  const char* name;
  const Kernels* (*kernels)();
  bool (*runs_here)();
};

#if defined(__x86_64__)
// Not asked for: F16C, which clang 14 does not know the name of. Every processor with AVX2 and FMA has it.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif

// Best first.
constexpr Capability kCapabilities[] = {
    {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
    {"avx512", kernels_avx512, has_avx512},
    {"avx2", kernels_avx2, has_avx2},
    {"default", kernels_default, [] { return true; }},
};

bool usable(const Capability& candidate) { return candidate.kernels() != nullptr && candidate.runs_here(); }

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Capability& pick() {
  const char* wanted = std::getenv("GCNET_EXT_CPU_CAPABILITY");
  for (const Capability& candidate : kCapabilities) {
    if (usable(candidate) && (wanted == nullptr || *wanted == '\0' || std::string(wanted) == candidate.name)) return candidate;
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
  for (const Capability& candidate : kCapabilities) {
    if (candidate.kernels() != nullptr) names.emplace_back(candidate.name);
  }
  return names;
}

std::vector<std::string> usable_capabilities() {
  std::vector<std::string> names;
  for (const Capability& candidate : kCapabilities) {
    if (usable(candidate)) names.emplace_back(candidate.name);
  }
  return names;
}

const Kernels& kernels() { return *in_use().kernels(); }

}  // namespace gcnet_ext::cpu
