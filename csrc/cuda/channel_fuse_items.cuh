// The fusion by items (channel_fuse.cuh, items.cuh), with all of its operands: x and the residual of the next piece are on their
// way to shared memory while a block works on this one. An access takes 16 bytes. The pieces are walked from the last to the
// first.
#pragma once

#include "fusion.cuh"
#include "items.cuh"
#include "shared_memory.cuh"

namespace gcnet_ext::cuda {

constexpr int kFuseItemBlocks = 3;  // per multiprocessor

template <typename T>
struct FuseStage {
  Vector<T, kWidest<T>>*x, *residual;  // [kCudaSweepUnroll, kCudaSweepThreads], of the maps that are there

  __host__ __device__ FuseStage(auto& memory, bool has_x, bool has_residual) {
    memory.take(x, has_x ? kCudaSweepUnroll * kCudaSweepThreads : 0);
    memory.take(residual, has_residual ? kCudaSweepUnroll * kCudaSweepThreads : 0);
  }
};

// The accesses of a thread to a piece. It has places of its own in the stage, so that no barrier is needed.
template <typename T>
class FuseAccesses {
  using A = acc_t<T>;
  static constexpr int V = kWidest<T>;

 public:
  using Factors = typename FuseParams<T>::Factors;

  __device__ FuseAccesses(const Fusion<T>& fusion, const FuseStage<T>& stage) : fusion_(fusion), stage_(stage) {
    hide_from_optimizer(thread_);
  }

  __device__ int thread() const { return thread_; }  // of the block

  // Starts to copy access u of the next piece, which begins at these offsets from the starts of the maps. The caches may be told
  // what to do with it: an Eviction.
  template <typename... Hint>
  __device__ void copy(int u, int64_t in_x, int64_t in_residual, bool wanted, const Hint&... hint) const {
    const int place = u * kCudaSweepThreads + thread_;
    if (fusion_.x.data) copy_later(stage_.x + place, fusion_.x.data + in_x, wanted, hint...);
    if (fusion_.residual.data) copy_later(stage_.residual + place, fusion_.residual.data + in_residual, wanted, hint...);
  }
  // Waits for the copies. Afterwards the next ones may be started.
  __device__ void take() {
    wait_for_copies();
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) {
      const int place = u * kCudaSweepThreads + thread_;
      x_[u] = residual_[u] = {};
      if (fusion_.x.data) x_[u] = stage_.x[place];
      if (fusion_.residual.data) residual_[u] = stage_.residual[place];
    }
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) hide_from_optimizer(x_[u]), hide_from_optimizer(residual_[u]);
  }

  // The result of elements that have these factors each, factors_of(j).
  template <int kCount, typename FactorsOf>
  __device__ Vector<T, kCount> fuse(const Vector<T, kCount>& x, const Vector<T, kCount>& residual,
                                    const FactorsOf& factors_of) const {
    A values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; j++) {
      const Factors factors = factors_of(j);
      values[j] = multiply_add(widen(x.data[j]), factors.scale, factors.shift);
    }
    if (fusion_.residual.data) {
#pragma unroll
      for (int j = 0; j < kCount; j++) values[j] += widen(residual.data[j]);
    }
    if (fusion_.relu) {
#pragma unroll
      for (int j = 0; j < kCount; j++) values[j] = values[j] < A(0) ? A(0) : values[j];  // a NaN is passed on
    }
    Vector<T, kCount> result;
#pragma unroll
    for (int j = 0; j < kCount; j++) result.data[j] = static_cast<T>(values[j]);
    return result;
  }
  template <typename FactorsOf>
  __device__ Vector<T, V> fuse(int u, const FactorsOf& factors_of) const {
    return fuse(x_[u], residual_[u], factors_of);
  }

  // Stores the results of an access at `out`, and their bits. All lanes of a warp call this together. kOnce: see store_once().
  template <bool kOnce = false>
  __device__ void put(const Vector<T, V>& result, T* out, bool inside) const {
    if (inside && kOnce) store_once(out, result);
    if (inside && !kOnce) store_vector(out, result);
    if (fusion_.positive) put_bits(result, out, inside);
  }

 private:
  // A byte has the bits of 8 elements that begin at a multiple of 8. Two neighbours share it where an access has 4 elements.
  __device__ void put_bits(const Vector<T, V>& result, const T* out, bool inside) const {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < V; j++) bits |= (widen(result.data[j]) <= A(0) ? 0u : 1u) << j;
    if constexpr (V == 4) {
      bits |= __shfl_xor_sync(kAllLanes, bits, 1) << 4;
      if (thread_ % 2) return;
    }
    if (inside) store(fusion_.positive + (out - fusion_.out.data) / 8, static_cast<uint8_t>(bits));
  }

  const Fusion<T>& fusion_;
  const FuseStage<T> stage_;
  // Hidden, because the compiler would keep in registers what depends on it alone, in a ticketed launch (tickets.cuh) throughout
  // all stages.
  int thread_ = static_cast<int>(threadIdx.x);
  Vector<T, V> x_[kCudaSweepUnroll], residual_[kCudaSweepUnroll];
};

// ---- NCHW: a piece is a part of a stretch of memory, and rows may end within an access ---------------------------------------

template <typename T>
constexpr int kFusePiece = kCudaSweepThreads * kWidest<T> * kCudaSweepUnroll;  // elements

struct FusePiece {
  int64_t segment, first;  // element of the segment
  int left;                // elements of the segment from there on, if they are fewer than a piece
};

template <typename T>
class FuseRows {
  using A = acc_t<T>;
  using Factors = typename FuseParams<T>::Factors;
  static constexpr int V = kWidest<T>, kPiece = kFusePiece<T>;

 public:
  __device__ FuseRows(const Fusion<T>& fusion, const RowSegments& segments, const FuseStage<T>& stage)
      : fusion_(fusion), segments_(segments), accesses_(fusion, stage) {}

  __device__ unsigned pieces_of_segment() const { return static_cast<unsigned>((elements() + kPiece - 1) / kPiece); }
  __device__ FusePiece piece(int64_t segment, unsigned number) const {
    const int64_t first = static_cast<int64_t>(number) * kPiece, left = elements() - first;
    return {segment, first, static_cast<int>(left < kPiece ? left : kPiece)};
  }
  // Starts to copy a piece.
  template <typename... Hint>
  __device__ void copy(const FusePiece& piece, const Hint&... hint) const {
    const int64_t x = piece.segment * fusion_.x.sample_stride + piece.first;
    const int64_t residual = piece.segment * fusion_.residual.sample_stride + piece.first;
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++)
      accesses_.copy(u, x + in_piece(u), residual + in_piece(u), in_piece(u) + V <= piece.left, hint...);
  }
  // Waits for it. Afterwards the next one may be copied.
  __device__ void take() { accesses_.take(); }

  // Computes the piece that was taken. kOnce: see store_once().
  template <bool kOnce = false>
  __device__ void put(const FusePiece& piece) const {
    const auto [segment, first, left] = piece;
    RowPiece<kPiece> rows(first, fusion_.extent.positions);
    rows.row += segment * segments_.rows;
    T* const out = fusion_.out.data + segment * fusion_.out.sample_stride + first;
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) {
      const int element = in_piece(u);
      const AccessFactors factors = factors_at(rows, element, left);
      const Vector<T, V> result = factors.alike() ? accesses_.fuse(u, [&](int) { return factors.here; })
                                                  : accesses_.fuse(u, [&](int j) { return factors.of(j); });
      accesses_.template put<kOnce>(result, out + element, element + V <= left);
    }
    // The last row may end within an access.
    if (const int element = left / V * V; element < left && in_piece(0) == element % (kCudaSweepThreads * V)) {
      const AccessFactors factors = factors_at(rows, element, left);
      const T* const x = fusion_.x.data + segment * fusion_.x.sample_stride + first;
      const T* const residual = fusion_.residual.data + segment * fusion_.residual.sample_stride + first;
      for (int e = element; e < left; e++) {
        Vector<T, 1> of_x{}, added{};
        if (fusion_.x.data) of_x.data[0] = load(x + e);
        if (fusion_.residual.data) added.data[0] = load(residual + e);
        store(out + e, accesses_.fuse(of_x, added, [&](int) { return factors.of(e - element); }).data[0]);
      }
    }
  }

 private:
  // The factors of an access, in which one row may end and the next one begin.
  struct AccessFactors {
    Factors here, next;
    int of_here;      // elements
    unsigned counts;  // bit j: whether element j gets a shift

    __device__ Factors of(int j) const {
      const bool within = j < of_here;
      const A shift = within ? here.shift : next.shift;
      return {within ? here.scale : next.scale, counts >> j & 1 ? shift : -A(0)};
    }
    __device__ bool alike() const { return of_here == V && counts == ~0u; }
  };

  __device__ int64_t elements() const { return segments_.rows * fusion_.extent.positions; }  // of a segment
  __device__ int in_piece(int u) const { return (u * kCudaSweepThreads + accesses_.thread()) * V; }
  __device__ unsigned sample_of(int64_t row) const {
    return static_cast<unsigned>(row) / static_cast<unsigned>(fusion_.extent.channels);
  }
  __device__ Factors factors_of_row(int64_t row) const {
    A shift = fusion_.shift.present() ? fusion_.shift.fresh(row) * fusion_.shift_factor : -A(0);
    if (fusion_.valid.data) shift *= load_fresh(fusion_.valid.shares + sample_of(row));
    return {fusion_.scale.present() ? fusion_.scale.fresh(row) : A(1), shift};
  }
  __device__ AccessFactors factors_at(const RowPiece<kPiece>& rows, int element, int left) const {
    AccessFactors factors{{}, {}, V, ~0u};
    if (element >= left) return factors;
    const auto [row, position] = rows.at(element);
    factors.here = factors_of_row(row);
    if (position + V > fusion_.extent.positions && element + V <= left) {
      factors.of_here = static_cast<int>(fusion_.extent.positions - position);
      factors.next = factors_of_row(row + 1);
    }
    if (fusion_.valid.data) {
      factors.counts = 0;
#pragma unroll 1
      for (int j = 0; j < V && element + j < left; j++) {
        const auto [row_of_j, position_of_j] = rows.at(element + j);
        if (fusion_.valid.at(sample_of(row_of_j), position_of_j)) factors.counts |= 1u << j;
      }
    }
    return factors;
  }

  const Fusion<T>& fusion_;
  const RowSegments& segments_;
  FuseAccesses<T> accesses_;
};

template <typename T>
__global__ void __launch_bounds__(kCudaSweepThreads, kFuseItemBlocks) fuse_row_items(Fusion<T> fusion, RowSegments segments) {
  FuseRows<T> rows(fusion, segments, shared_memory<FuseStage<T>>(fusion.x.data != nullptr, fusion.residual.data != nullptr));
  const unsigned pieces = rows.pieces_of_segment(), items = static_cast<unsigned>(segments.count) * pieces;
  const auto piece_of = [&](unsigned item) {
    const unsigned piece = items - 1 - item;
    return rows.piece(piece / pieces, piece % pieces);
  };
  if (blockIdx.x < items) rows.copy(piece_of(blockIdx.x));
  wait_for_previous_launch();
  for (unsigned item = blockIdx.x; item < items; item += gridDim.x) {
    rows.take();
    if (item + gridDim.x < items) rows.copy(piece_of(item + gridDim.x));
    rows.put(piece_of(item));
  }
}

// ---- channels_last: a thread keeps the factors of its channels while it goes through the tiles of an item --------------------

// The threads of a block: `lanes` accesses of channels side by side at each of `rows` positions. The channels of a position need
// `blocks` of them.
struct ChannelLanes {
  unsigned lanes, rows, blocks;
  int64_t tile, last_tile;  // the positions of a tile; the first one of a sample's last tile

  ChannelLanes(const Extent& extent, int vector) {
    const int64_t accesses = (extent.channels + vector - 1) / vector;
    lanes = static_cast<unsigned>(std::min<int64_t>(accesses, kCudaSweepThreads));
    rows = kCudaSweepThreads / lanes;
    blocks = static_cast<unsigned>((accesses + lanes - 1) / lanes);
    tile = rows * kCudaSweepUnroll;
    last_tile = (extent.positions - 1) / tile * tile;
  }
};

template <typename T>
__global__ void __launch_bounds__(kCudaSweepThreads, kFuseItemBlocks)
    fuse_position_items(Fusion<T> fusion, ItemTiles tiles, ChannelLanes lanes) {
  using A = acc_t<T>;
  using Factors = typename FuseParams<T>::Factors;
  constexpr int V = kWidest<T>;
  const int64_t C = fusion.extent.channels;
  const unsigned lane = threadIdx.x % lanes.lanes, row = threadIdx.x / lanes.lanes;
  FuseAccesses<T> accesses(fusion, shared_memory<FuseStage<T>>(fusion.x.data != nullptr, fusion.residual.data != nullptr));

  struct Tile {
    int64_t sample, channel, position;  // of this thread's first access
    int left;                           // positions from there on, if they are fewer than those of a tile; 0 for an idle thread

    __device__ bool has(int hop) const { return hop < left; }
  };
  const auto tile_of = [&](const ItemTiles& at) -> Tile {  // from the end
    const unsigned block = at.items / at.splits - 1 - at.item / at.splits;
    const int64_t channel = (block % lanes.blocks * lanes.lanes + lane) * V, position = lanes.last_tile - at.first + row;
    const int64_t left = at.end - position < at.positions ? at.end - position : at.positions;
    return {block / lanes.blocks, channel, position, row < lanes.rows && channel < C ? static_cast<int>(left) : 0};
  };
  const auto copy = [&](const ItemTiles& next) {
    if (!next.there()) return;
    const Tile at = tile_of(next);
    int64_t x = fusion.x.offset(at.sample, at.channel, at.position);
    int64_t residual = fusion.residual.offset(at.sample, at.channel, at.position);
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) {
      accesses.copy(u, x, residual, at.has(u * static_cast<int>(lanes.rows)));
      x += lanes.rows * fusion.x.position_stride;
      residual += lanes.rows * fusion.residual.position_stride;
    }
  };

  tiles.begin(blockIdx.x);
  copy(tiles);
  wait_for_previous_launch();
  A scale[V], shift[V];
  bool begins = true;  // an item
  while (tiles.there()) {
    const Tile at = tile_of(tiles);
    const ItemTiles next = tiles.next();
    accesses.take();
    copy(next);
    if (begins) {
#pragma unroll
      for (int j = 0; j < V; j++) scale[j] = A(1), shift[j] = -A(0);
      if (at.channel < C && fusion.scale.present()) fusion.scale.get_fresh(at.sample * C + at.channel, scale);
      if (at.channel < C && fusion.shift.present()) fusion.shift.get_fresh(at.sample * C + at.channel, shift);
      A factor = fusion.shift.present() ? fusion.shift_factor : A(1);
#pragma unroll
      for (int j = 0; j < V; j++) shift[j] *= factor;
      if (fusion.valid.data) {
        const A share = load_fresh(fusion.valid.shares + at.sample);
#pragma unroll
        for (int j = 0; j < V; j++) shift[j] *= share;
      }
    }
    T* out = fusion.out.at(at.sample, at.channel, at.position);
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++, out += lanes.rows * fusion.out.position_stride) {
      const int hop = u * static_cast<int>(lanes.rows);
      const bool counts = !at.has(hop) || fusion.valid.counts(at.sample, at.position + hop);
      const auto factors_of = [&](int j) -> Factors { return {scale[j], counts ? shift[j] : -A(0)}; };
      accesses.put(accesses.fuse(u, factors_of), out, at.has(hop));
    }
    begins = tiles.last_of_item();
    tiles = next;
  }
}

// ---- launches ----------------------------------------------------------------------------------------------------------------

// Launches the fusion by items if the maps allow accesses of 16 bytes, and returns whether they do.
template <typename T>
bool launch_fuse_items(Fusion<T> fusion, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    constexpr int V = kWidest<T>;
    const Extent& extent = fusion.extent;
    if (extent.elements() == 0) return true;
    uint8_t* const bits = fusion.positive;
    const bool bits_of_access = (extent.channels_last ? extent.channels : extent.positions) % 8 == 0;
    if (!bits_of_access) fusion.positive = nullptr;  // a byte does not belong to one access, or to two neighbours
    const size_t shared = shared_bytes<FuseStage<T>>(fusion.x.data != nullptr, fusion.residual.data != nullptr);
    const auto launch_fusion = [&](auto kernel, int64_t items, const auto&... cut) {
      if (!items_fit(shared, items)) return false;
      launch_items(kernel, items, kFuseItemBlocks, kCudaSweepThreads, shared, fusion.early, stream, fusion, cut...);
      if (bits && !bits_of_access) launch_positive_bits(read_only(fusion.out), extent, bits, stream);
      return true;
    };
    if (extent.channels_last) {
      if (cuda_vector(common_shape<T>(extent, fusion.x, fusion.residual, fusion.out)) != V) return false;
      const ChannelLanes lanes(extent, V);
      constexpr int kTilesOfItem = 2;  // the factors of an item are loaded once
      const int64_t blocks = extent.samples * lanes.blocks, positions_of_item = kTilesOfItem * lanes.tile;
      const int64_t splits = (extent.positions + positions_of_item - 1) / positions_of_item;
      const ItemTiles tiles(blocks, extent.positions, splits, lanes.tile);
      return launch_fusion(fuse_position_items<T>, blocks * splits, tiles, lanes);
    }
    const RowSegments segments = row_segments<T>(extent, fusion.x, fusion.residual, fusion.out);
    if (!segments.wide || extent.samples * extent.channels > kCudaMaxBlocks) return false;  // rows are counted in 32 bits
    const int64_t pieces = (segments.rows * extent.positions + kFusePiece<T> - 1) / kFusePiece<T>;
    return launch_fusion(fuse_row_items<T>, segments.count * pieces, segments);
  }
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_fuse_items)

}  // namespace gcnet_ext::cuda
