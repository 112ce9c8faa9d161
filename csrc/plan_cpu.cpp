#include "plan_cpu.h"

#include "cpu/kernels/types.h"

#include <algorithm>

namespace gcnet_ext {
namespace {

constexpr int64_t kTileBytes = 256 << 10;  // half of a small second-level cache
constexpr int64_t kMinTile = 64;           // positions: four vectors of 16 floats
constexpr int64_t kMaxSplits = 64;         // partial results of a sample: 64 C elements at most
constexpr int64_t kSweepBytes = 128 << 10;
constexpr int64_t kSmallSample = 1 << 20;       // bytes of a sample that is cut by channels: it is read twice, from a cache
constexpr int64_t kWide = 512;                  // channels; with more, tiles are short pieces of rows far apart, and a larger
constexpr int64_t kMaxByChannels = 20 << 20;    // sample is cut by channels, too
constexpr int64_t kMaxRow = 16384;              // positions whose logits stay in a cache while the rows go by
constexpr int64_t kMaxParts = 16;               // of such a sample: P elements each
constexpr int64_t kBits = 8;                    // of a byte, which only one block writes to
constexpr int64_t kRowBlock = 4;                // rows that the kernels take at once
constexpr int64_t kShare = 1 << 20;             // bytes of x that a core still has in a cache when they are read again
constexpr int64_t kShared = 16 << 20;           // the same of the cache that the cores have in common
constexpr int64_t kPastCaches = 2 * kShared;    // of maps: more than what the cores have in common holds until the next call
constexpr int64_t kMaxAloneWeights = 64 << 10;  // bytes of the transform that one thread reads for its own samples
constexpr int64_t kWeightsShare = 8;            // where threads share it, a group outweighs it so many times
constexpr int64_t kMaxIdle = 8;                 // at most one in so many threads may have nothing to do in the last round

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool by_channels(int64_t channels, int64_t positions, int64_t element_size, bool channels_last) {
  const int64_t bytes = channels * positions * element_size;
  if (channels_last || positions > kMaxRow) return false;
  return bytes <= kSmallSample || (channels > kWide && bytes <= kMaxByChannels);
}
}  // namespace

PoolPlan plan_cpu_pool(int64_t channels, int64_t positions, int64_t element_size, bool channels_last) {
  if (by_channels(channels, positions, element_size, channels_last)) return {true, positions, positions, 1};
  const int64_t fitting = kTileBytes / (channels * element_size) / kMinTile * kMinTile;
  const int64_t tile = std::clamp(fitting, kMinTile, cpu::kMaxTile);
  const int64_t tiles = std::max<int64_t>(1, ceil_div(positions, tile));
  const int64_t tiles_per_split = ceil_div(tiles, kMaxSplits);
  return {false, tile, tile * tiles_per_split, ceil_div(tiles, tiles_per_split)};
}

SweepPlan plan_cpu_sweep(int64_t channels, int64_t positions, int64_t element_size, bool channels_last) {
  const int64_t elements = kSweepBytes / element_size;
  SweepPlan plan{};
  if (channels_last) {
    plan.channels = channels;
    plan.positions = std::max(elements / channels, ceil_div(positions, kMaxSplits));
  } else {
    const int64_t parts = std::clamp<int64_t>(ceil_div(positions, elements), 1, kMaxSplits);
    plan.positions = ceil_div(ceil_div(positions, parts), kBits) * kBits;
    plan.channels = elements / std::max<int64_t>(1, positions);
    if (by_channels(channels, positions, element_size, channels_last)) {
      plan.channels = ceil_div(std::max(plan.channels, ceil_div(channels, kMaxParts)), kRowBlock) * kRowBlock;
    }
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
  const bool cached = sample_bytes <= std::max(kShare, kShared / threads);
  const bool alone = busy && cached && weight_bytes <= std::max(kMaxAloneWeights, sample_bytes / 4);
  const int64_t shared = std::max(threads * kShare, kWeightsShare * weight_bytes);
  const int64_t bytes = !alone ? shared : sample_bytes <= kShare ? kShare / 2 : kShared / threads;
  return {std::clamp<int64_t>(bytes / std::max<int64_t>(1, sample_bytes), 1, std::max<int64_t>(1, samples)), alone};
}

bool plan_cpu_non_temporal(int64_t bytes) { return bytes > kPastCaches; }

}  // namespace gcnet_ext
