// The items that the blocks of a launch share, where a launch has as many blocks as run at a time: a block works on the items
// blockIdx.x, blockIdx.x + gridDim.x, ... and copies what it needs next to shared memory while it works on what it has.
#pragma once

#include "launch.h"

namespace gcnet_ext::cuda {

// The tiles that a block of the pool, or of its backward pass, goes through. An item is a split of a sample: the tiles number
// split, split + splits, ... of it.
struct ItemTiles {
  unsigned items, splits;  // of all samples; of one
  int positions;           // of a tile
  int64_t end;             // of a sample
  unsigned item = 0;
  int64_t first = 0;  // the first position of the tile

  ItemTiles(int64_t samples, int64_t all_positions, int64_t splits, int64_t tile_positions)
      : items(static_cast<unsigned>(samples * splits)),
        splits(static_cast<unsigned>(splits)),
        positions(static_cast<int>(tile_positions)),
        end(all_positions) {}

  __device__ void begin(unsigned at) {
    item = at;
    first = static_cast<int64_t>(split()) * positions;
  }
  __device__ bool there() const { return item < items; }
  __device__ int64_t sample() const { return item / splits; }
  __device__ unsigned split() const { return item % splits; }
  __device__ bool first_of_item() const { return first < static_cast<int64_t>(splits) * positions; }
  __device__ bool last_of_item() const { return first + static_cast<int64_t>(splits) * positions >= end; }
  // The next tile of the item, or else the first one of item `following`, which may not be there.
  __device__ ItemTiles next(unsigned following) const {
    ItemTiles tiles = *this;
    if (last_of_item()) {
      tiles.begin(following);
    } else {
      tiles.first += static_cast<int64_t>(splits) * positions;
    }
    return tiles;
  }
  // Where the blocks of the launch share the items.
  __device__ ItemTiles next() const { return next(item + gridDim.x); }
};

// Whether a kernel can have this much shared memory on the current device, and whether an unsigned counts the items.
inline bool items_fit(size_t shared_bytes, int64_t items) {
  return shared_bytes <= most_shared_bytes() && items <= kCudaMaxBlocks;
}

// Launches as many blocks as run at a time, `blocks` per multiprocessor if their shared memory allows it, or one per item.
// early: see launch_early().
template <class... Parameters, class... Arguments>
void launch_items(void (*kernel)(Parameters...), int64_t items, int blocks, int threads, size_t shared_bytes, bool early,
                  cudaStream_t stream, const Arguments&... arguments) {
  if (items == 0) return;
  const dim3 grid(static_cast<unsigned>(std::min(items, blocks_at_a_time(blocks, shared_bytes))));
  allow_shared_bytes(kernel, shared_bytes);
  if (early) return launch_early(kernel, grid, dim3(threads), shared_bytes, stream, arguments...);
  launch(kernel, grid, dim3(threads), shared_bytes, stream, arguments...);
}

}  // namespace gcnet_ext::cuda
