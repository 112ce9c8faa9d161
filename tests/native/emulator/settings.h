// The settings of the emulator, which are variables of the environment (cuda_emulation.h).
#pragma once

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda_emulation.h"

namespace gcnet_ext::cuda::emulation {

// The order in which threads run: GCNET_EMULATION_SCHEDULE and GCNET_EMULATION_SEED.
struct Schedule {
  bool depth_first = true;
  uint64_t seed = 0;

  Schedule() {
    if (const char* text = std::getenv("GCNET_EMULATION_SEED")) seed = std::strtoull(text, nullptr, 10);
    if (const char* text = std::getenv("GCNET_EMULATION_SCHEDULE")) {
      const std::string name = text;
      if (name != "depth-first" && name != "round-robin") {
        throw std::runtime_error("GCNET_EMULATION_SCHEDULE must be depth-first or round-robin, got " + name);
      }
      depth_first = name == "depth-first";
    }
  }

  uint64_t random(uint64_t below) {  // xorshift64*
    seed ^= seed >> 12, seed ^= seed << 25, seed ^= seed >> 27;
    return (seed * 0x2545F4914F6CDD1Dull >> 11) % below;
  }
};

// The barrier or atomic that GCNET_EMULATION_DROP leaves out.
struct Dropped {
  std::string file, half;
  unsigned line = 0;

  Dropped() {
    const char* text = std::getenv("GCNET_EMULATION_DROP");
    if (!text) return;
    std::stringstream fields(text);
    std::getline(fields, file, ':') >> line;
    std::getline(fields.ignore(), half);
  }
  bool is(const Site& site) const {
    if (site.line() != line) return false;
    const char* slash = std::strrchr(site.file_name(), '/');
    return file == (slash ? slash + 1 : site.file_name());
  }
};

}  // namespace gcnet_ext::cuda::emulation
