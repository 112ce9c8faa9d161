#include "plan_cuda.h"

#include <algorithm>
#include <numeric>

namespace gcnet_ext {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every row (NCHW) or position (channels_last) of a dense map starts at a multiple of this many bytes: 16, 8 or fewer.
int64_t alignment(const CudaShape& shape) {
  const int64_t bytes = (shape.channels_last ? shape.channels : shape.positions) * shape.element_size;
  return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : shape.element_size;
}

void cut(CudaPoolPlan& plan, int64_t positions, int64_t least_tiles, int64_t most_splits) {
  const int64_t tiles = ceil_div(positions, plan.tile_positions);
  plan.tiles_per_split = std::max(std::min(least_tiles, tiles), ceil_div(tiles, std::min(tiles, most_splits)));
  plan.splits = ceil_div(tiles, plan.tiles_per_split);
}

// Plans the tile that is `larger` sizes larger than the smallest with these accesses that holds all channels, if one does.
template <size_t kCount>
void fit(const std::array<CudaRowTile, kCount>& tiles, int vector, int64_t channels, int64_t larger, CudaPoolPlan& plan,
         CudaPoolPath path = CudaPoolPath::rows) {
  if (plan.tile >= 0 || channels > tiles.back().channels) return;
  int64_t i = 0;
  while (channels > tiles[i].channels) i++;
  i = std::min<int64_t>(i + larger, kCount - 1);
  plan.path = path;
  plan.vector = vector;
  plan.tile = static_cast<int>(i);
  plan.threads = tiles[i].threads;
  plan.tile_positions = static_cast<int64_t>(tiles[i].lanes) * vector;
}

}  // namespace

bool cuda_aligned(const CudaShape& shape, const void* address, int64_t sample_stride, int64_t channel_stride,
                  int64_t position_stride) {
  const int64_t strides = (shape.channels_last ? position_stride : channel_stride) | sample_stride;
  return (strides * shape.element_size | static_cast<int64_t>(reinterpret_cast<uintptr_t>(address))) % alignment(shape) == 0;
}

int cuda_vector(const CudaShape& shape) {
  if (!shape.aligned) return 1;
  if (alignment(shape) == 16) return static_cast<int>(16 / shape.element_size);
  return alignment(shape) == 8 && shape.element_size == 2 && !shape.channels_last ? 4 : 1;
}

CudaPoolPlan plan_cuda_pool(const CudaShape& shape, const CudaTuning& tuning) {
  CudaPoolPlan plan{CudaPoolPath::streamed, 1, -1, kCudaStreamedThreads, kCudaStreamedPositions, 0, 0};
  const int vector = cuda_vector(shape);
  int64_t least_tiles = 1;
  if (shape.element_size == 8 || tuning.streamed) {
    // One path is enough for float64, which is for checking gradients.
  } else if (shape.channels_last) {
    // Warps that share the channels of a position, and groups of them that work on different positions.
    const int64_t warps = ceil_div(shape.channels, 32 * vector);
    if (warps <= 16) {
      const int64_t groups = std::max<int64_t>(1, 8 / warps);
      // The launch that merges the splits of items has slices of the channels, which are limited.
      const bool items = tuning.by_items() && vector * shape.element_size == 16 &&
                         plan_cuda_transform_slices(shape.channels).channels <= kCudaMostSliceChannels;
      plan.path = items ? CudaPoolPath::position_items : CudaPoolPath::positions;
      plan.vector = vector;
      plan.threads = static_cast<int>(groups * warps * 32);
      plan.tile_positions = groups * kCudaPositionsPerWarp;
      // A block that reads less is not worth its start and end. An item may be smaller, because it is copied while its block still
      // works on the item before it.
      constexpr int64_t kLeastBytes = 64 << 10, kLeastItemBytes = 32 << 10;
      const int64_t tile_bytes = plan.tile_positions * shape.channels * shape.element_size;
      least_tiles = items ? std::max<int64_t>(1, kLeastItemBytes / tile_bytes) : ceil_div(kLeastBytes, tile_bytes);
    }
  } else {
    const int64_t larger = tuning.larger_tile;
    if (plan_cuda_flat(shape, tuning)) {
      plan = {CudaPoolPath::flat, static_cast<int>(16 / shape.element_size), 0, kCudaFlatThreads, shape.positions, 1, 1};
      return plan;
    }
    if (tuning.by_items() && vector * shape.element_size == 16)
      fit(kCudaRowItemTiles, vector, shape.channels, larger, plan, CudaPoolPath::row_items);
    if (vector * shape.element_size == 16) fit(kCudaRowTiles, vector, shape.channels, larger, plan);
    if (vector * shape.element_size == 8) fit(kCudaHalfRowTiles, vector, shape.channels, larger, plan);
    fit(kCudaScalarRowTiles, 1, shape.channels, larger, plan);
  }
  const int64_t most_splits = plan_cuda_most_splits(tuning, plan.by_items() ? kCudaMaxItemSplits : kCudaMaxSplits);
  cut(plan, shape.positions, least_tiles, most_splits);
  return plan;
}

CudaPoolPlan plan_cuda_pool_backward(const CudaShape& shape, const CudaTuning& tuning) {
  if (plan_cuda_flat(shape, tuning)) return plan_cuda_pool(shape, tuning);
  CudaTuning of_first_engine = tuning;
  of_first_engine.engine = 1;
  CudaPoolPlan plan = plan_cuda_pool(shape, of_first_engine);
  const int vector = cuda_vector(shape);
  if (!tuning.by_items() || tuning.streamed || vector * shape.element_size != 16 || shape.element_size == 8) return plan;
  if (shape.channels_last) {
    if (plan.path != CudaPoolPath::positions) return plan;
    plan.path = CudaPoolPath::position_items;
  } else {
    plan.tile = -1;
    fit(kCudaRowBackwardItemTiles, vector, shape.channels, tuning.larger_tile, plan, CudaPoolPath::row_items);
    if (plan.tile < 0) return plan_cuda_pool(shape, of_first_engine);
  }
  cut(plan, shape.positions, /*least_tiles=*/1, plan_cuda_most_splits(tuning, kCudaMaxBackwardItemSplits));
  return plan;
}

int plan_cuda_cluster(int64_t channels, const CudaPoolPlan& plan, const CudaTuning& tuning) {
  constexpr int kThreads = 256;  // of a block in a ticketed launch
  if (!tuning.by_tickets() || plan.path != CudaPoolPath::row_items || channels > kCudaTicketChannels) return 0;
  const int cluster = plan.threads / kThreads;
  return cluster == 1 || tuning.cluster != 1 ? cluster : 0;
}

int64_t plan_cuda_lag(int64_t sample_bytes, int64_t samples, int64_t item_bytes, const CudaTuning& tuning) {
  // A batch of at most kWhole bytes stays in the second-level cache. Of others, 20 MB do, or 8 MB where a sample is large.
  constexpr int64_t kMega = 1'000'000, kWhole = 25 * kMega, kLarge = 17 * kMega;
  if (tuning.lag) return std::max<int64_t>(tuning.lag, 0);
  const int64_t items = samples * ceil_div(sample_bytes, item_bytes);
  if (sample_bytes * samples <= kWhole) return items;
  return std::min(items, ceil_div((sample_bytes < kLarge ? 20 : 8) * kMega, item_bytes));
}

CudaFlatCut plan_cuda_flat_cut(int64_t channels, int64_t positions, int64_t element_size) {
  constexpr int64_t kLeastBytes = 16 << 10, kMostBytes = 32 << 10, kPieces = 16;
  const int64_t row_bytes = positions * element_size, vector = std::max<int64_t>(1, 16 / element_size);
  const int64_t row_vector = std::gcd(positions, vector), unit = vector / row_vector;
  const auto whole_units = [&](int64_t rows) { return std::max<int64_t>(1, rows / unit) * unit; };
  const int64_t bytes = std::clamp(channels * row_bytes / kPieces, kLeastBytes, kMostBytes);
  const int64_t pieces = ceil_div(channels, whole_units(bytes / row_bytes));
  const int64_t rows = ceil_div(ceil_div(channels, pieces), unit) * unit;
  const int lanes = rows < kCudaFlatThreads / 2 ? kCudaFlatManyLanes : kCudaFlatFewLanes;  // a thread has two rows at a time
  return {rows, ceil_div(channels, rows), static_cast<int>(unit), static_cast<int>(row_vector), lanes};
}

bool plan_cuda_flat(const CudaShape& shape, const CudaTuning& tuning) {
  if (!tuning.by_items() || tuning.streamed || shape.channels_last || shape.element_size > 4) return false;
  const bool wide = cuda_vector(shape) * shape.element_size == 16;
  if (wide && shape.positions >= kCudaShortRow) return false;
  if (shape.positions + 1 < 16 / shape.element_size) return false;
  if (shape.channels > kCudaFlatChannels || shape.positions > kCudaFlatPositions) return false;
  const CudaFlatCut cut = plan_cuda_flat_cut(shape.channels, shape.positions, shape.element_size);
  return cut.pieces <= kCudaFlatPieces && cut.unit_rows * shape.positions <= kCudaFlatUnit;
}

int64_t plan_cuda_pieces(int64_t samples, int64_t pieces, int64_t slots) {
  constexpr int64_t kStartAndEnd = 3, kPiece = 2;  // the proportion of the times that a block spends on them
  int64_t best = 1, least = INT64_MAX;
  for (int64_t blocks = 1; blocks <= std::min(pieces, slots); blocks++) {  // per sample
    const int64_t each = ceil_div(pieces, blocks), waves = ceil_div(samples * ceil_div(pieces, each), slots);
    const int64_t time = waves * (kStartAndEnd + each * kPiece);
    if (time < least) {
      best = each;
      least = time;
    }
  }
  return best;
}

int64_t plan_cuda_most_splits(const CudaTuning& tuning, int64_t most) {
  return tuning.splits ? std::min(tuning.splits, most) : most;
}

bool plan_cuda_tail(int64_t channels, int64_t units, int64_t weight_bytes, int64_t accumulation_size,
                    const CudaTuning& tuning) {
  constexpr int64_t kMostBytes = 64 << 10;  // what one block reads in less time than two more launches take
  // TransformBackwardShared (csrc/cuda/transform_backward.cuh) has 3 channels, 2 units, and this with padding, in values.
  constexpr int64_t kScratch = 1024 + 64;
  const bool fits = (3 * channels + 2 * units + kScratch) * accumulation_size <= static_cast<int64_t>(kCudaSharedBytes);
  return fits && (tuning.transform ? tuning.transform == 1 : weight_bytes <= kMostBytes);
}

CudaTransformSlices plan_cuda_transform_slices(int64_t channels) {
  constexpr int64_t kLeast = 64, kSlices = 8;
  const int64_t of_slice = ceil_div(ceil_div(channels, kSlices), kLeast) * kLeast;
  return {of_slice, ceil_div(channels, of_slice)};
}

bool plan_cuda_transform_split(int64_t channels, int64_t hidden_units, int64_t accumulation_size, const CudaTuning& tuning) {
  return tuning.by_items() && accumulation_size == sizeof(float) && hidden_units <= kCudaMostSplitUnits &&
         plan_cuda_transform_slices(channels).channels <= kCudaMostSliceChannels;
}

int plan_cuda_samples_together(int64_t samples, int64_t blocks_per_sample, int64_t slots) {
  constexpr int kMost = 8;
  int together = 1;
  while (together < kMost && ceil_div(samples, together) * blocks_per_sample > slots) together *= 2;
  return together;
}

CudaPositionGrid plan_cuda_positions(const CudaShape& shape, int vector, int64_t most_splits) {
  constexpr int64_t kAccesses = 4 * kCudaSweepUnroll;  // per thread, at least, if there are as many positions
  const int64_t vectors = ceil_div(shape.channels, vector), lanes = std::min<int64_t>(vectors, kCudaSweepThreads);
  const int64_t positions = std::max<int64_t>(shape.positions, 1), rows = kCudaSweepThreads / lanes;
  const int64_t pieces = std::min(ceil_div(positions, rows * kAccesses), std::max<int64_t>(most_splits, 1));
  const int64_t split = ceil_div(ceil_div(positions, pieces), rows) * rows;
  return {static_cast<int>(lanes), static_cast<int>(rows), ceil_div(vectors, lanes), split, ceil_div(positions, split)};
}

CudaSumsItems plan_cuda_sums_items(const CudaShape& shape, const CudaTuning& tuning) {
  const int64_t vector = cuda_vector(shape), channels = shape.channels, positions = std::max<int64_t>(shape.positions, 1);
  CudaSumsItems cut{};
  int64_t piece = 0, least_pieces = 1;  // the positions that a block works on at a time; of a split, at least
  if (shape.channels_last) {
    constexpr int64_t kMostLanes = 16;  // stretches of 256 bytes
    const int64_t vectors = ceil_div(channels, vector);
    cut.channel_groups = ceil_div(vectors, kMostLanes);
    cut.lanes = static_cast<int>(ceil_div(vectors, cut.channel_groups));
    cut.rows = kCudaSweepThreads / cut.lanes;
    piece = cut.rows * kCudaSweepUnroll;
    least_pieces = 2;  // a split with fewer is not worth its partial sums
  } else {
    // With few lanes, the fewest of them have no access at the end of a row. With many, a sample has more items for blocks to share.
    // So the sum of two numbers of pieces is least: what one block does for a sample, and its share of all of the sample's.
    double least = 0;
    for (int lanes = 2; lanes <= kCudaSweepThreads; lanes *= 2) {
      const int rows = kCudaSweepThreads / lanes;
      const int64_t groups = ceil_div(channels, rows), pieces = ceil_div(positions, lanes * vector * kCudaSweepUnroll);
      const double of_block = static_cast<double>(ceil_div(groups, kCudaItemsOfSample)) * static_cast<double>(pieces);
      const double share = static_cast<double>(groups) * static_cast<double>(pieces) / kCudaItemsOfSample;
      if (tuning.row_lanes ? lanes != std::max<int64_t>(tuning.row_lanes, 2) : lanes > 2 && of_block + share >= least) continue;
      least = of_block + share;
      cut.lanes = lanes;
      cut.rows = rows;
      cut.channel_groups = groups;
    }
    piece = cut.lanes * vector * kCudaSweepUnroll;
  }
  // In NCHW only rows that have a whole block are cut.
  const bool whole_rows = !shape.channels_last && cut.rows > 1;
  const int64_t wanted = whole_rows ? 1 : ceil_div(kCudaItemsOfSample, cut.channel_groups);
  const int64_t pieces = ceil_div(positions, piece), splits = std::min({wanted, pieces, plan_cuda_most_splits(tuning)});
  cut.split_positions = std::max(std::min(least_pieces, pieces), ceil_div(pieces, splits)) * piece;
  cut.splits = ceil_div(positions, cut.split_positions);
  return cut;
}

int plan_cuda_row_lanes(const CudaShape& shape, int vector, const CudaTuning& tuning) {
  if (tuning.row_lanes) return static_cast<int>(tuning.row_lanes);
  constexpr int64_t kLeastThreads = 1 << 14, kMostRounds = 5;
  const int64_t accesses = ceil_div(shape.positions, vector);
  const auto enough = [&](int64_t lanes) {
    return shape.channels * lanes >= kLeastThreads && accesses <= kMostRounds * kCudaSweepUnroll * lanes;
  };
  int lanes = 1;
  while (lanes < kCudaSweepThreads && lanes < accesses && !enough(lanes)) lanes *= 2;
  return lanes;
}

}  // namespace gcnet_ext
