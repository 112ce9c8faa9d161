// How the CUDA kernels cut their work. Pure functions of one sample's shape, the dtype, the layout and the alignment: never of
// the batch or of the GPU, so that a sample gives the same bits in any batch and on any GPU of the same architecture. Only how
// much of it a block does, one piece after the other (plan_cuda_pieces), goes by them. No torch, no CUDA: visible from Python
// as gcnet_ext._C.plan(...).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace gcnet_ext {

// What a caller may decide in the place of these functions, to compare on a GPU; 0 leaves a decision to them. Each choice
// computes the same but for the last bits.
struct CudaTuning {
  int64_t streamed;     // 1: the pool takes the path of that name
  int64_t larger_tile;  // how many sizes larger a tile of rows is than the smallest that holds all channels
  int64_t splits;       // the most blocks that share a sample's pool or its channels_last sums
  int64_t row_lanes;    // lanes per row of the sums of an NCHW map, a power of two
  int64_t transform;    // 1: the last block of a sample computes it if its shared memory is enough; 2: launches of its own do
};

// One sample's feature map, as far as plans depend on it.
struct CudaShape {
  int64_t channels, positions, element_size;
  bool channels_last;
  bool aligned;  // every row (NCHW) or position (channels_last) starts at a multiple of 16 or 8 bytes if its length is one
};

// A tile of all channels x `lanes` accesses of positions that a block holds in registers, `rows` accesses per thread.
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

// Who reads a feature map that is needed twice, for the logits and for the weighted sum.
enum class CudaPoolPath {
  rows,       // NCHW: a tile of rows stays in the registers of a block (kCudaRowTiles)
  positions,  // channels_last: some positions stay in the registers of one to sixteen warps
  streamed    // any shape: a tile is read twice, the second time from the caches
};

struct CudaPoolPlan {
  CudaPoolPath path;
  int vector;                       // elements per access
  int tile;                         // index into the tiles with such accesses
  int threads;                      // of a block
  int64_t tile_positions;           // positions that a block works on at a time
  int64_t tiles_per_split, splits;  // a block works on tiles_per_split tiles at most; a sample has so many blocks
};
CudaPoolPlan plan_cuda_pool(const CudaShape& shape, const CudaTuning& tuning = {});

// How many of the pieces of a sample a block should do so that all are done soonest, where `slots` blocks run at a time.
int64_t plan_cuda_pieces(int64_t samples, int64_t pieces, int64_t slots);

// Elements of the widest access: of 16 bytes, of 8 in NCHW if they are float16 or bfloat16, otherwise one.
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

// The most splits of a sample.
int64_t plan_cuda_most_splits(const CudaTuning& tuning);

// The sums over the positions of an NCHW map: lanes per row, a power of two up to the threads of a block. Few, so that each
// has enough to do, but enough to keep the GPU busy with one sample.
int plan_cuda_row_lanes(const CudaShape& shape, int vector, const CudaTuning& tuning = {});

// More splits keep more processors busy on one sample; each costs a row of partial sums that the last block has to merge alone.
inline constexpr int64_t kCudaMaxSplits = 64;

inline constexpr int kCudaSweepThreads = 256;
inline constexpr int kCudaSweepUnroll = 4;  // accesses of a thread that are under way together

// Whether the block that completes a sample's context also transforms it, with all the weights by itself; otherwise further
// launches share the weights among blocks and samples. Bytes of all w1 and w2, and hidden units, of both branches together.
bool plan_cuda_tail(int64_t channels, int64_t units, int64_t weight_bytes, int64_t accumulation_size,
                    const CudaTuning& tuning = {});

inline constexpr int64_t kCudaMaxBlocks = 0x7fffffff;  // of one launch
inline constexpr size_t kCudaSharedBytes = 48 << 10;   // that every GPU grants without being asked

}  // namespace gcnet_ext
