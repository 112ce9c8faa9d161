// How the CUDA kernels cut their work. These are pure functions of one sample's shape, the dtype, the layout and the alignment,
// and never of the batch or the GPU, so that a sample gives the same bits in any batch and on any GPU of the same architecture.
// Three functions also look at the batch, or at how many blocks run at a time: plan_cuda_pieces, plan_cuda_samples_together and
// plan_cuda_lag. They decide when and by which block work is done, on which no bit of a result depends. There is no torch and no
// CUDA in here; Python sees the plans as gcnet_ext._C.plan(...).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace gcnet_ext {

// Decisions of a caller in the place of these functions, for comparisons on a GPU; 0 leaves a decision to them. Each choice
// computes the same result but for its last bits.
struct CudaTuning {
  int64_t streamed;     // 1: the pool takes CudaPoolPath::streamed
  int64_t larger_tile;  // how many sizes larger a tile of rows is than the smallest that holds all channels
  int64_t splits;       // the most blocks that share a sample's pool or its channels_last sums
  int64_t row_lanes;    // lanes per row of the sums of an NCHW map, a power of two
  int64_t transform;    // 1: in the last block of a sample, if its shared memory is enough; 2: in launches of its own
  // 1, the first engine, "v1" in Python: a block has one split of a sample, and the last block of a sample merges the splits. 0
  // is the same today. 2, the second engine, "v2": blocks walk maps by items (csrc/cuda/items.cuh), and the transform runs in
  // stages that many blocks share (plan_cuda_transform_slices), where these fit. 3, "tickets": as 2, but one launch does all
  // stages of a direction (csrc/cuda/tickets.cuh), where that fits.
  int64_t engine;
  // Of engine 3: how many items of its first stage the last stage of a sample stays behind, -1 for none.
  int64_t lag;
  int64_t cluster;  // of engine 3: the most blocks that share a tile, 1 or 2
  int64_t hints;    // of engine 3: 1 if the kernels do not tell the caches what is not needed again

  constexpr bool by_items() const { return engine >= 2; }
  constexpr bool by_tickets() const { return engine == 3; }
};

// One sample's feature map, as far as plans depend on it.
struct CudaShape {
  int64_t channels, positions, element_size;
  bool channels_last;
  bool aligned;  // rows (NCHW) or positions (channels_last) start at multiples of 16 (8) bytes if their size is such a multiple
};

// A tile that a block holds in registers: all channels, and the positions of `lanes` accesses. A thread has `rows` accesses.
struct CudaRowTile {
  int64_t channels;  // the most that fit: threads / lanes * rows
  int threads, lanes, rows;
};
// Accesses of 16 bytes: segments of 256, 256, 128, 128 and 64 bytes.
inline constexpr std::array<CudaRowTile, 5> kCudaRowTiles{
    {{64, 256, 16, 4}, {256, 256, 16, 16}, {512, 256, 8, 16}, {1024, 512, 8, 16}, {2048, 512, 4, 16}}};
// Accesses of 8 bytes, of float16 and bfloat16: segments of 128, 128 and 64 bytes.
inline constexpr std::array<CudaRowTile, 3> kCudaHalfRowTiles{{{512, 256, 16, 32}, {1024, 512, 16, 32}, {2048, 512, 8, 32}}};
// Accesses of one element.
inline constexpr std::array<CudaRowTile, 3> kCudaScalarRowTiles{{{256, 256, 32, 32}, {1024, 512, 32, 64}, {2048, 512, 16, 64}}};

// Accesses of 16 bytes, for items: segments of 256, 128, 128, 128 and 64 bytes. The next tile waits in shared memory, where a
// multiprocessor has room for two blocks with 64 KB or one with 128 KB.
inline constexpr std::array<CudaRowTile, 5> kCudaRowItemTiles{
    {{64, 256, 16, 4}, {256, 256, 8, 8}, {512, 256, 8, 16}, {1024, 512, 8, 16}, {2048, 512, 4, 16}}};
// Those of the backward pass, in which the next tile of the gradient waits beside that of x.
inline constexpr std::array<CudaRowTile, 4> kCudaRowBackwardItemTiles{
    {{64, 256, 16, 4}, {256, 256, 8, 8}, {512, 256, 4, 8}, {1024, 512, 4, 8}}};

// How a feature map is read that is needed twice, for the logits and for the weighted sum.
enum class CudaPoolPath {
  rows,            // NCHW: a tile of rows stays in the registers of a block (kCudaRowTiles)
  positions,       // channels_last: a few positions stay in the registers of one to sixteen warps
  streamed,        // any shape: a tile is read twice, the second time from the caches
  row_items,       // rows, in the second engine: the next tile is on its way while a block works on one (kCudaRowItemTiles)
  position_items,  // positions, in the same way
  flat             // NCHW in the second engine, rows that are short or odd: pieces of whole rows (plan_cuda_flat_cut)
};

struct CudaPoolPlan {
  CudaPoolPath path;
  int vector;                       // elements per access
  int tile;                         // index into the tiles with such accesses
  int threads;                      // of a block
  int64_t tile_positions;           // positions that a block works on at a time
  int64_t tiles_per_split, splits;  // a sample has `splits` blocks, each with at most tiles_per_split tiles

  // Whether blocks walk the splits of all samples as items, and a launch after them merges the splits.
  bool by_items() const { return path == CudaPoolPath::row_items || path == CudaPoolPath::position_items; }
};
CudaPoolPlan plan_cuda_pool(const CudaShape& shape, const CudaTuning& tuning = {});
// Of the backward pass, which has items of its own in the second engine (kCudaRowBackwardItemTiles).
CudaPoolPlan plan_cuda_pool_backward(const CudaShape& shape, const CudaTuning& tuning = {});

// The blocks that share a tile in a ticketed launch (csrc/cuda/tickets.cuh): a cluster of two plays the threads of the larger
// tiles. 0 if a direction with this plan takes no tickets.
int plan_cuda_cluster(int64_t channels, const CudaPoolPlan& plan, const CudaTuning& tuning);
inline constexpr int64_t kCudaTicketChannels = 1024;  // the kernel of a larger tile does not find enough registers

// How many items of its first stage the last stage of a sample stays behind in a ticketed launch, in addition to a sample: few
// enough for the second-level cache to have what both of them read. sample_bytes are, of one sample, those of the maps that both
// the first and the last stage read; item_bytes are the same of an item of the first stage.
int64_t plan_cuda_lag(int64_t sample_bytes, int64_t samples, int64_t item_bytes, const CudaTuning& tuning);

// How an NCHW sample whose rows lie one behind the other is cut into pieces of whole rows for the stages of
// csrc/cuda/flat_rows.cuh. Every piece begins at a multiple of 16 bytes from the start of the sample.
struct CudaFlatCut {
  int64_t rows, pieces;  // the rows of a piece (the last one may have fewer); the pieces of a sample
  int unit_rows;         // after so many rows, the accesses of 16 bytes begin with a row again
  int row_vector;        // the elements of the widest access, of at most 16 bytes, that the start of every row allows
  int lanes;             // of a row, in sums over its positions: kCudaFlatFewLanes or kCudaFlatManyLanes
};
CudaFlatCut plan_cuda_flat_cut(int64_t channels, int64_t positions, int64_t element_size);

// Whether a map takes those stages: its rows allow no access of 16 bytes or are few such accesses long, no access has elements of
// three rows, and a sample has so few pieces that every block can merge the results of all.
bool plan_cuda_flat(const CudaShape& shape, const CudaTuning& tuning);
inline constexpr int64_t kCudaFlatChannels = 2048, kCudaFlatPositions = 1088, kCudaFlatPieces = 32;
inline constexpr int64_t kCudaFlatUnit = 4224;  // elements of unit_rows rows, at most
inline constexpr int64_t kCudaShortRow = 256;   // positions below which rows of 16-byte accesses take those stages, too
inline constexpr int kCudaFlatThreads = 256, kCudaFlatFewLanes = 2, kCudaFlatManyLanes = 16;

// The number of a sample's pieces that a block should do so that all are done soonest, if `slots` blocks run at a time.
int64_t plan_cuda_pieces(int64_t samples, int64_t pieces, int64_t slots);

// The elements of the widest access that the map allows: those of 16 bytes, in NCHW also float16 and bfloat16 of 8 bytes, or
// one.
int cuda_vector(const CudaShape& shape);

// Whether a map with this address and these strides (in elements) is CudaShape::aligned.
bool cuda_aligned(const CudaShape& shape, const void* address, int64_t sample_stride, int64_t channel_stride,
                  int64_t position_stride);

inline constexpr int kCudaPositionsPerWarp = 8;    // of the path `positions`
inline constexpr int kCudaStreamedPositions = 32;  // of the path `streamed`
inline constexpr int kCudaStreamedThreads = 256;

// A sweep over a channels_last map: a thread has one access of channels and goes through positions; a block has `lanes`
// accesses side by side and `rows` positions at a time; a sample has `channel_blocks` x `splits` blocks.
struct CudaPositionGrid {
  int lanes, rows;
  int64_t channel_blocks, split_positions, splits;
};
CudaPositionGrid plan_cuda_positions(const CudaShape& shape, int vector, int64_t most_splits);

// The lanes of a row in the sums over the positions of an NCHW map, a power of two up to the threads of a block: few, so that
// each has enough to do, but enough to keep the GPU busy with one sample.
int plan_cuda_row_lanes(const CudaShape& shape, int vector, const CudaTuning& tuning = {});

// How the sums of the second engine are cut into items: an item has a group of channels of a split of a sample's positions, and
// its block works on `lanes` x `rows` accesses at a time. In NCHW these are the lanes of a row, a power of two, and the rows of
// as many channels; in channels_last the channels of a position, and positions.
struct CudaSumsItems {
  int lanes, rows;
  int64_t channel_groups, split_positions, splits;
};
CudaSumsItems plan_cuda_sums_items(const CudaShape& shape, const CudaTuning& tuning = {});

// More splits keep more processors busy on one sample; each costs a row of partial sums that the last block has to merge alone.
inline constexpr int64_t kCudaMaxSplits = 64;
inline constexpr int64_t kCudaMaxItemSplits = 256;          // of the second engine, in which many blocks merge them
inline constexpr int64_t kCudaMaxBackwardItemSplits = 128;  // each leaves a part of the gradient of the weight
inline constexpr int64_t kCudaItemsOfSample = 128;          // as many keep the multiprocessors of a large GPU busy
int64_t plan_cuda_most_splits(const CudaTuning& tuning, int64_t most = kCudaMaxSplits);

inline constexpr int kCudaSweepThreads = 256;
inline constexpr int kCudaSweepUnroll = 4;  // accesses of a thread that are under way together

// Whether the block that completes a sample's context also transforms it, for which it reads all weights by itself. Otherwise
// further launches share the weights among blocks and samples. weight_bytes (of all w1 and w2) and units are those of both
// branches together.
bool plan_cuda_tail(int64_t channels, int64_t units, int64_t weight_bytes, int64_t accumulation_size,
                    const CudaTuning& tuning = {});

// How the channels are cut for the stages of transform_split.cuh: a block multiplies with the weights of one slice of them.
struct CudaTransformSlices {
  int64_t channels, slices;  // the channels of a slice, a multiple of 64 (the last one may have fewer); the slices of a sample
};
inline constexpr int64_t kCudaMostSliceChannels = 256, kCudaMostSplitUnits = 512;
CudaTransformSlices plan_cuda_transform_slices(int64_t channels);

// Whether the transform runs in those stages. hidden_units are those in front of a w2, of both branches together. Without a
// decision it does not: no GPU has shown yet that the stages are right and faster than what they replace.
bool plan_cuda_transform_split(int64_t channels, int64_t hidden_units, int64_t accumulation_size, const CudaTuning& tuning);

// How many samples a block of those stages works on, a power of two up to 8: as few as keep all samples in `slots` blocks that
// run at a time, because the samples of a block share the weights that it loads. No bit depends on it.
int plan_cuda_samples_together(int64_t samples, int64_t blocks_per_sample, int64_t slots);

inline constexpr int64_t kCudaMaxBlocks = 0x7fffffff;  // of one launch
inline constexpr size_t kCudaSharedBytes = 48 << 10;   // every GPU grants these without an opt-in

}  // namespace gcnet_ext
