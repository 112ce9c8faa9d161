#include "plan_cpu.h"

#include <algorithm>

namespace gcnet_ext {
namespace {

constexpr int64_t kTileBytes = 256 << 10;  // half of a small second-level cache
constexpr int64_t kMinTile = 64;           // positions: four vectors of 16 floats
constexpr int64_t kMaxTile = 4096;         // what the kernels have scratch space for
constexpr int64_t kMaxSplits = 64;         // partial results of a sample: 64 C elements at most
constexpr int64_t kSweepBytes = 128 << 10;
constexpr int64_t kSweepPositions = 1024;  // at least; in NCHW, so that blocks follow one another as the pool's tiles do
constexpr int64_t kMinGroupBytes = 8 << 20;
constexpr int64_t kMaxAloneBytes = 4 << 20;     // of a sample that one thread takes through all steps
constexpr int64_t kMaxAloneWeights = 64 << 10;  // which it then reads for every sample
constexpr int64_t kMaxIdle = 8;                 // at most one in so many threads may have nothing to do in the last round

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PoolPlan plan_cpu_pool(int64_t channels, int64_t positions, int64_t element_size) {
  const int64_t fitting = kTileBytes / (channels * element_size) / kMinTile * kMinTile;
  const int64_t tile = std::clamp(fitting, kMinTile, kMaxTile);
  const int64_t tiles = std::max<int64_t>(1, ceil_div(positions, tile));
  const int64_t tiles_per_split = ceil_div(tiles, kMaxSplits);
  return {tile, tile * tiles_per_split, ceil_div(tiles, tiles_per_split)};
}

SweepPlan plan_cpu_sweep(int64_t channels, int64_t positions, int64_t element_size, bool channels_last) {
  const int64_t elements = kSweepBytes / element_size;
  SweepPlan plan{};
  if (channels_last) {
    plan.channels = channels;
    plan.positions = std::max(elements / channels, ceil_div(positions, kMaxSplits));
  } else {
    plan.positions = std::max(kSweepPositions, ceil_div(positions, kMaxSplits));
    plan.channels = elements / std::max<int64_t>(1, std::min(plan.positions, positions));
  }
  plan.channels = std::clamp<int64_t>(plan.channels, 1, channels);
  plan.positions = std::clamp<int64_t>(plan.positions, 1, std::max<int64_t>(1, positions));
  plan.channel_blocks = ceil_div(channels, plan.channels);
  plan.position_blocks = ceil_div(positions, plan.positions);
  return plan;
}

GroupPlan plan_cpu_group(int64_t samples, int64_t sample_bytes, int64_t weight_bytes, int64_t threads) {
  const int64_t rounds = ceil_div(samples, threads), idle = rounds * threads - samples;
  const bool busy = idle * kMaxIdle <= rounds * threads;
  if (busy && sample_bytes <= kMaxAloneBytes && weight_bytes <= std::max(kMaxAloneWeights, sample_bytes / 8)) return {1, true};
  // The weights of the transform are read once per group: they should not outweigh the samples.
  const int64_t bytes = std::max({kMinGroupBytes, 2 * weight_bytes, threads * (kMinGroupBytes / 4)});
  return {std::clamp<int64_t>(bytes / std::max<int64_t>(1, sample_bytes), 1, std::max<int64_t>(1, samples)), false};
}

}  // namespace gcnet_ext
