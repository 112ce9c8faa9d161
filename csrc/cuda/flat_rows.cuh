// What the stages for short or odd rows share (plan_cuda_flat): how an NCHW sample, one stretch of C * P elements, is cut into
// pieces of whole rows; how a piece comes to shared memory; and who adds up what there. A row is the P positions of a channel.
//
// A piece is copied in accesses of 16 bytes, wherever its rows begin. After unit_rows rows, P accesses or fewer, the pattern in
// which rows begin within accesses is repeated. So a thread that takes the same column, the access of this number, from one unit
// after the other meets the same positions in each: what belongs to them stays in its registers.
#pragma once

#include <utility>

#include "feature_map.cuh"
#include "items.cuh"
#include "reduce.cuh"
#include "shared_memory.cuh"

namespace gcnet_ext::cuda {

constexpr int kFlatThreads = kCudaFlatThreads, kFlatWarps = kFlatThreads / kWarp;
constexpr int kFlatBlocks = 3;  // on a multiprocessor

// ---- pieces ------------------------------------------------------------------------------------------------------------------

struct FlatPiece {
  int64_t sample;
  int number, first_row, rows;  // of the sample
};

// The pieces of all samples, which are the items of a launch. A block has neighbours of them, so that it finds what belongs to
// a sample only once for several pieces.
struct FlatPieces {
  unsigned items, pieces;  // of all samples; of one
  int channels, positions;
  int rows, unit_rows, row_vector, lanes;  // see CudaFlatCut

  FlatPieces(const Extent& extent, size_t element_size) {
    const CudaFlatCut cut = plan_cuda_flat_cut(extent.channels, extent.positions, static_cast<int64_t>(element_size));
    items = static_cast<unsigned>(extent.samples * cut.pieces);
    pieces = static_cast<unsigned>(cut.pieces);
    channels = static_cast<int>(extent.channels);
    positions = static_cast<int>(extent.positions);
    rows = static_cast<int>(cut.rows);
    unit_rows = cut.unit_rows;
    row_vector = cut.row_vector;
    lanes = cut.lanes;
  }

  // The items of this block are those from the bound of its number to that of the next one.
  __device__ unsigned bound(unsigned block) const {
    return static_cast<unsigned>(static_cast<uint64_t>(items) * block / gridDim.x);
  }
  __device__ FlatPiece at(unsigned item) const {
    const int number = static_cast<int>(item % pieces), first_row = number * rows, left = channels - first_row;
    return {static_cast<int64_t>(item / pieces), number, first_row, left < rows ? left : rows};
  }
  __host__ __device__ int unit() const { return unit_rows * positions; }  // elements of a unit
};

// ---- from and to the map -----------------------------------------------------------------------------------------------------

// A map whose rows lie one behind the other.
template <typename T>
struct FlatMap {
  T* data = nullptr;
  int64_t sample_stride = 0;
  int positions = 0;
  bool wide = false;  // whether every sample begins at a multiple of 16 bytes; if not, accesses are of one element

  FlatMap() = default;
  FlatMap(const Map<T>& map, const Extent& extent)
      : data(map.data), sample_stride(map.sample_stride), positions(static_cast<int>(extent.positions)) {
    const uintptr_t step = extent.samples > 1 ? static_cast<uintptr_t>(map.sample_stride) * sizeof(T) : 0;
    wide = (reinterpret_cast<uintptr_t>(map.data) | step) % 16 == 0;
  }
  __device__ T* at(const FlatPiece& piece) const { return data + piece.sample * sample_stride + piece.first_row * positions; }
};

// Whether the rows of a map lie one behind the other.
template <typename T>
bool is_flat(const Map<T>& map, const Extent& extent) {
  const bool rows = extent.positions == 1 || map.position_stride == 1;
  return !map.data || (rows && (extent.channels == 1 || map.channel_stride == extent.positions));
}

// Whether the maps that a stage walks together are for the stages of this file.
template <typename T, typename... Maps>
bool takes_flat_stages(const Extent& extent, const Maps&... maps) {
  if constexpr (std::is_same_v<T, double>) return false;
  return plan_cuda_flat(common_shape<T>(extent, maps...), tuning()) && (is_flat(maps, extent) && ...);
}

// The accesses that hold so many elements.
template <typename T>
__host__ __device__ constexpr int accesses_of(int elements) {
  return (elements + kWidest<T> - 1) / kWidest<T>;
}

// Of the largest piece.
template <typename T>
__host__ __device__ int stage_accesses(const FlatPieces& pieces) {
  return accesses_of<T>(pieces.rows * pieces.positions);
}

// Starts to copy a piece to shared memory, where zeros follow it up to a whole access. Other threads of the block may read it
// after wait_for_copies() and a barrier.
template <typename T>
__device__ __forceinline__ void copy_piece(Vector<T, kWidest<T>>* stage, const FlatMap<const T>& map, const FlatPiece& piece) {
  constexpr int V = kWidest<T>;
  const T* const from = map.at(piece);
  const int elements = piece.rows * map.positions, whole = map.wide ? elements / V : 0;
#pragma unroll 4
  for (int a = threadIdx.x; a < whole; a += kFlatThreads) copy_later(stage + a, from + a * V, true);
  T* const narrow = reinterpret_cast<T*>(stage);
  load_ahead<8>(
      whole * V + threadIdx.x, accesses_of<T>(elements) * V, kFlatThreads,
      [&](int64_t i) { return i < elements ? load(from + i) : T(0.0f); }, [&](int64_t i, T value) { narrow[i] = value; });
}

// W neighbours in shared memory.
template <int W, typename Value>
__device__ __forceinline__ Vector<Value, W> neighbours(const Value* from) {
  return *reinterpret_cast<const Vector<Value, W>*>(from);
}
template <int W, typename Value>
__device__ __forceinline__ void store_neighbours(Value* to, const Vector<Value, W>& values) {
  *reinterpret_cast<Vector<Value, W>*>(to) = values;
}

// ---- sums over the rows, for every position --------------------------------------------------------------------------------------

// The columns of a thread: those numbered column, column + kFlatThreads, ... below columns(). Where a unit has few, the block
// is cut into groups, which share the units; a thread without a group has nothing to do.
struct FlatColumns {
  int columns, groups, group, column;

  __host__ __device__ static int groups_of(int columns) { return columns < kFlatThreads ? kFlatThreads / columns : 1; }

  __device__ explicit FlatColumns(int columns) : columns(columns), groups(groups_of(columns)) {
    group = columns < kFlatThreads ? static_cast<int>(threadIdx.x) / columns : 0;
    column = group < groups ? static_cast<int>(threadIdx.x) - group * columns : columns;
  }
};

// Where the elements of a column lie, V neighbours that are in one row or in two.
template <int V>
struct FlatColumn {
  int row, position;  // of the first element; the row within the unit
  int before;         // elements that are in that row

  __device__ FlatColumn(int column, int positions)
      : row(column * V / positions), position(column * V - row * positions), before(positions - position) {}

  // All bits set where an element is in the first row, for blend().
  __device__ uint32_t in_first_row(int j) const { return j < before ? ~0u : 0u; }
  __device__ int position_of(int j) const { return j < before ? position + j : j - before; }
};

// ---- sums over the positions, for every row ------------------------------------------------------------------------------------

// Adds up rows over their positions, each by kLanes lanes, kTogether rows of a thread at a time: add(sums, starts, p) adds what W
// neighbours from position p on have to the kSums sums of each row, whose first elements are number starts[...] of the piece, and
// put(row, sums) gets the sums in one of the lanes. P is a multiple of W.
constexpr int kFlatRowsTogether = 2;

template <int W, int kLanes, int kSums, typename Add, typename Put>
__device__ __forceinline__ void sum_rows(int rows, int positions, const Add& add, const Put& put) {
  constexpr int kTogether = kFlatRowsTogether, kStep = kFlatThreads / kLanes, kRowsOfWarp = kWarp / kLanes;
  const int part = threadIdx.x % kLanes, warp_row = threadIdx.x / kWarp * kRowsOfWarp;
  for (int first = 0; first < rows; first += kTogether * kStep) {
    // Each thread has kTogether rows if there are enough, so that few warps have work and the others skip it.
    const int left = (rows - first + kTogether - 1) / kTogether, whole = (left + kRowsOfWarp - 1) / kRowsOfWarp * kRowsOfWarp;
    const int hop = whole < kStep ? whole : kStep;
    if (warp_row >= hop) continue;
    int row[kTogether], start[kTogether];
    float sums[kTogether][kSums] = {};
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      row[i] = first + static_cast<int>(threadIdx.x) / kLanes + i * hop;
      start[i] = (row[i] < rows ? row[i] : 0) * positions;
    }
#pragma unroll 4
    for (int p = part * W; p < positions; p += kLanes * W) add(sums, start, p);
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
#pragma unroll
      for (int s = 0; s < kSums; s++) sums[i][s] = sum_over_lanes(sums[i][s], 1, kLanes / 2);
      if (part == 0 && row[i] < rows) put(row[i], sums[i]);
    }
  }
}

// Calls body with the neighbours in a row that are read together, up to four, and the lanes of a row, as constants.
template <typename Body>
__device__ __forceinline__ void with_row_access(const FlatPieces& pieces, const Body& body) {
  const auto with_lanes = [&](auto width) {
    if (pieces.lanes == kCudaFlatFewLanes) return body(width, std::integral_constant<int, kCudaFlatFewLanes>{});
    body(width, std::integral_constant<int, kCudaFlatManyLanes>{});
  };
  if (pieces.row_vector >= 4) return with_lanes(std::integral_constant<int, 4>{});
  if (pieces.row_vector == 2) return with_lanes(std::integral_constant<int, 2>{});
  with_lanes(std::integral_constant<int, 1>{});
}

// The sum of coefficient_p x_p over the positions of every row of a piece; put(row, sum) gets it.
template <int W, int kLanes, typename T, typename Put>
__device__ __forceinline__ void sum_products(const T* x, const float* coefficient, int rows, int positions, const Put& put) {
  sum_rows<W, kLanes, 1>(
      rows, positions,
      [&](float(&sums)[kFlatRowsTogether][1], const int(&start)[kFlatRowsTogether], int p) {
        const auto factors = neighbours<W>(coefficient + p);
#pragma unroll
        for (int i = 0; i < kFlatRowsTogether; i++) {
          const auto values = neighbours<W>(x + start[i] + p);
#pragma unroll
          for (int j = 0; j < W; j++) sums[i][0] += factors.data[j] * widen(values.data[j]);
        }
      },
      [&](int row, const float(&sum)[1]) { put(row, sum[0]); });
}

// Puts zeros in the place of the values of a piece at positions that do not count, which may be NaN. Needs a barrier before and
// after it.
template <typename T>
__device__ __forceinline__ void clear_uncounted(T* x, const uint8_t* counts, int rows, int positions) {
  int p = threadIdx.x % positions;
  const int step = kFlatThreads % positions;
  for (int i = threadIdx.x; i < rows * positions; i += kFlatThreads) {
    if (!counts[p]) x[i] = T(0.0f);
    p += step;
    if (p >= positions) p -= positions;
  }
}

}  // namespace gcnet_ext::cuda
