// What the stages for short or odd rows share (plan_cuda_flat): how an NCHW sample, one stretch of C * P elements, is cut into
// pieces of whole rows; how a piece comes to shared memory; and who adds up what there. A row is the P positions of a channel.
//
// A piece is copied in accesses of 16 bytes, wherever its rows begin. After unit_rows rows, P accesses or fewer, the pattern in
// which rows begin within accesses is repeated. So a thread that takes the same column, the access of this number, from one unit
// after the other meets the same positions in each: what belongs to them stays in its registers.
#pragma once

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

// The row within the unit and the position of every element of a column.
template <int V>
struct FlatColumn {
  int row[V], position[V];

  __device__ FlatColumn(int column, int positions) {
#pragma unroll
    for (int j = 0; j < V; j++) {
      row[j] = (column * V + j) / positions;
      position[j] = column * V + j - row[j] * positions;
    }
  }
};

// ---- sums over the positions, for every row --------------------------------------------------------------------------------------

// Adds up rows over their positions, each by pieces.lanes lanes: add(sums, row, p) adds what W neighbours from position p on
// have to the kSums sums of a row, and put(row, sums) gets them in one of its lanes. W is a divisor of P. A thread has two rows at a time.
template <int W, int kSums, typename Add, typename Put>
__device__ __forceinline__ void sum_rows(const FlatPieces& pieces, int rows, const Add& add, const Put& put) {
  constexpr int kTogether = 2, kUnroll = 4 / W;
  const int lanes = pieces.lanes, part = threadIdx.x % lanes, step = kFlatThreads / lanes;
  for (int first = 0; first < rows; first += kTogether * step) {
    int row[kTogether];
    float sums[kTogether][kSums] = {};
#pragma unroll
    for (int i = 0; i < kTogether; i++) row[i] = first + static_cast<int>(threadIdx.x) / lanes + i * step;
    if (row[0] - static_cast<int>(threadIdx.x) % kWarp / lanes >= rows) continue;  // no row of this warp is there
#pragma unroll kUnroll
    for (int p = part * W; p < pieces.positions; p += lanes * W) {
#pragma unroll
      for (int i = 0; i < kTogether; i++) add(sums[i], row[i] < rows ? row[i] : 0, p);
    }
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
#pragma unroll
      for (int s = 0; s < kSums; s++) sums[i][s] = sum_over_lanes(sums[i][s], 1, lanes / 2);
      if (part == 0 && row[i] < rows) put(row[i], sums[i]);
    }
  }
}

// Calls body with the neighbours in a row that are read together, up to four, as a constant.
template <typename Body>
__device__ __forceinline__ void with_row_vector(int row_vector, const Body& body) {
  if (row_vector >= 4) return body(std::integral_constant<int, 4>{});
  if (row_vector == 2) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 1>{});
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

}  // namespace gcnet_ext::cuda
