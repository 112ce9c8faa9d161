#include "plan_cpu.h"

#include "cpu/kernels/types.h"

#include <algorithm>

namespace gcnet_ext {
namespace {

constexpr int64_t kTileBytes = 256 << 10;       // half of a small second-level cache
constexpr int64_t kMinTile = 64;                // positions: four vectors of 16 floats
constexpr int64_t kMaxSplits = 64;              // of a sample, each of which has a partial result of C elements
constexpr int64_t kBlockBytes = 128 << 10;      // of a sweep
constexpr int64_t kSmallSample = 1 << 20;       // bytes of a sample that is cut by channels: it is read twice, from a cache
constexpr int64_t kWide = 512;                  // channels: a tile of more would be short pieces of rows that lie far apart
constexpr int64_t kMaxWideSample = 20 << 20;    // bytes, up to which a sample of more channels than that is cut by channels
constexpr int64_t kMaxRow = 16384;              // positions whose logits stay in a cache while the rows go by
constexpr int64_t kMaxChannelBlocks = 16;       // of a sample that is cut by channels: each has a partial result of P elements
constexpr int64_t kBits = 8;                    // positions whose bits share a byte: only one block may write to it
constexpr int64_t kRowBlock = 4;                // channels that the kernels take at once
constexpr int64_t kCoreCache = 1 << 20;         // bytes of x that a core still finds in its cache when it reads them again
constexpr int64_t kSharedCache = 16 << 20;      // bytes of x that the cores find in the cache that they share
constexpr int64_t kMaxMaps = 2 * kSharedCache;  // bytes of maps of which the shared cache keeps something until the next call
constexpr int64_t kMaxWeights = 64 << 10;       // bytes of the transform's weights that one thread reads for its own samples
constexpr int64_t kWeightsShare = 8;  // where threads share the weights, a group of samples has so many times their bytes
constexpr int64_t kMaxIdle = 8;       // at most one in so many threads may have nothing to do in the last round

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool by_channels(int64_t channels, int64_t positions, int64_t element_size, bool channels_last) {
  const int64_t bytes = channels * positions * element_size;
  if (channels_last || positions > kMaxRow) return false;
  return bytes <= kSmallSample || (channels > kWide && bytes <= kMaxWideSample);
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
  const int64_t elements = kBlockBytes / element_size;
  SweepPlan plan{};
  if (channels_last) {
    plan.channels = channels;
    plan.positions = std::max(elements / channels, ceil_div(positions, kMaxSplits));
  } else {
    const int64_t parts = std::clamp<int64_t>(ceil_div(positions, elements), 1, kMaxSplits);
    plan.positions = ceil_div(ceil_div(positions, parts), kBits) * kBits;
    plan.channels = elements / std::max<int64_t>(1, positions);
    if (by_channels(channels, positions, element_size, channels_last)) {
      plan.channels = ceil_div(std::max(plan.channels, ceil_div(channels, kMaxChannelBlocks)), kRowBlock) * kRowBlock;
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
  const bool cached = sample_bytes <= std::max(kCoreCache, kSharedCache / threads);
  const bool per_thread = busy && cached && weight_bytes <= std::max(kMaxWeights, sample_bytes / 4);
  const int64_t shared = std::max(threads * kCoreCache, kWeightsShare * weight_bytes);
  const int64_t bytes = !per_thread ? shared : sample_bytes <= kCoreCache ? kCoreCache / 2 : kSharedCache / threads;
  return {std::clamp<int64_t>(bytes / std::max<int64_t>(1, sample_bytes), 1, std::max<int64_t>(1, samples)), per_thread};
}

bool plan_cpu_non_temporal(int64_t bytes) { return bytes > kMaxMaps; }

}  // namespace gcnet_ext
