// A tile of an NCHW sample in the registers of a block: all C channels x a segment of neighbouring positions, so that x is read
// once although it is needed twice, for a sum over the channels and for a sum over the positions.
//
// kLanes lanes cover the segment, kVector positions each; a thread holds kRows channels of its positions.
#pragma once

#include <algorithm>
#include <utility>

#include "../plan_cuda.h"
#include "cluster.cuh"
#include "memory_access.h"
#include "reduce.cuh"

namespace gcnet_ext::cuda {

template <int kVector, int kLanes, int kRows, int kThreads>
struct RowShape {
  static constexpr int vector = kVector, lanes = kLanes, rows = kRows, threads = kThreads;
  static constexpr int positions = kLanes * kVector;
  static constexpr int step = kThreads / kLanes;  // channels between two rows of a thread
  static constexpr int channels = step * kRows;   // of a sample, at most
  static constexpr int warps = kThreads / kWarp;
  static constexpr int blocks = 512 / kThreads;  // per multiprocessor: this leaves a thread 128 registers
  // Rows that are summed over their positions together. More would not find registers.
  static constexpr int group = std::min({kLanes, kRows, kRows > 16 ? 8 : 16});
  static constexpr int groups = kRows / group;
  static_assert(kWarp % kLanes == 0 && kRows % group == 0);
};

// kCluster: a cluster of so many blocks (cluster.cuh) shares the tile. The threads of the shape are theirs then, one block after
// the other, and the sums over the channels of a warp go to the shared memory of all of them.
template <typename T, typename Shape, int kCluster = 1>
class RowTile {
  using A = acc_t<T>;
  static constexpr int V = Shape::vector, kThreads = Shape::threads / kCluster;

 public:
  __device__ RowTile()
      : warp_(threadIdx.x / kWarp),
        lane_(threadIdx.x % kWarp),
        segment_(threadIdx.x % Shape::lanes),
        channel_(threadIdx.x / Shape::lanes) {
    if constexpr (kCluster > 1) {
      const int rank = static_cast<int>(cluster_rank());
      warp_ += rank * (kThreads / kWarp);
      channel_ += rank * (kThreads / Shape::lanes);
    }
  }

  __device__ int position() const { return segment_ * V; }  // this thread's first position within the tile
  __device__ int channel(int row) const { return channel_ + row * Shape::step; }
  __device__ Vector<T, V>& row(int i) { return rows_[i]; }

  // tile_start is the address of the tile's first position in channel 0. Elements outside of x count as zero.
  __device__ void load_rows(const T* tile_start, int64_t channel_stride, int channels, bool inside) {
    const T* from = tile_start + channel_ * channel_stride + position();
    const int64_t hop = Shape::step * channel_stride;
#pragma unroll
    for (int i = 0; i < Shape::rows; i++, from += hop) {
      const bool needed = inside & (channel(i) < channels);
      rows_[i] = {};
      if (needed) rows_[i] = load_vector<V>(from);
    }
  }

  // Where a row of this thread waits in `stage` [rows][threads of the block] in shared memory.
  __device__ static Vector<T, V>* place(Vector<T, V>* stage, int row) { return stage + row * kThreads + threadIdx.x; }

  // Starts to copy a tile to `stage`, in which a thread has places of its own, so that take_rows() needs no barrier. The caches
  // may be told what to do with it: an Eviction.
  template <typename... Hint>
  __device__ void copy_rows(Vector<T, V>* stage, const T* tile_start, int64_t channel_stride, int channels, bool inside,
                            const Hint&... hint) const {
    const T* from = tile_start + channel_ * channel_stride + position();
#pragma unroll
    for (int i = 0; i < Shape::rows; i++, from += Shape::step * channel_stride)
      copy_later(place(stage, i), from, inside & (channel(i) < channels), hint...);
  }
  // Waits for the copies. Afterwards the next ones may be started.
  __device__ void take_rows(const Vector<T, V>* stage) {
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < Shape::rows; i++) rows_[i] = stage[i * kThreads + threadIdx.x];
    hide();  // the values have arrived
  }

  // Zeros take the place of the values at positions that do not count, which may be NaN. `valid` has the bytes of this thread's
  // positions.
  __device__ void keep_valid(const uint8_t* valid) {
    bool counts[V];
#pragma unroll
    for (int j = 0; j < V; j++) counts[j] = load(valid + j) != 0;
#pragma unroll
    for (int i = 0; i < Shape::rows; i++) {
#pragma unroll
      for (int j = 0; j < V; j++) rows_[i].data[j] = counts[j] ? rows_[i].data[j] : T(0.0f);
    }
  }

  // Asks the second-level cache for a tile that is loaded later. For accesses of single elements this is not worth it.
  __device__ void prefetch_rows(const T* tile_start, int64_t channel_stride, int channels, bool inside) const {
    if constexpr (V == 1) return;
    const T* from = tile_start + channel_ * channel_stride + position();
#pragma unroll
    for (int i = 0; i < Shape::rows; i++, from += Shape::step * channel_stride) {
      if (inside & (channel(i) < channels)) prefetch(from);
    }
  }

  // Keeps the compiler from widening the tile before this point and holding on to the result.
  __device__ void hide() {
#pragma unroll
    for (int i = 0; i < Shape::rows; i++) hide_from_optimizer(rows_[i]);
  }

  // sums[warp][p] = sum_c coefficient[c] x_cp over the channels of this warp. coefficient [Shape::channels] and sums are
  // in shared memory.
  __device__ void sum_over_channels(const A* coefficient, A* sums) const {
    A sum[V];
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] = A(0);
#pragma unroll
    for (int i = 0; i < Shape::rows; i++) {
      const A factor = coefficient[channel(i)];
#pragma unroll
      for (int j = 0; j < V; j++) sum[j] += factor * widen(rows_[i].data[j]);
    }
    const Share share = transposed_sum<V, Shape::lanes, kWarp / 2>(sum, lane_);
    constexpr int kRowsOfLanes = kWarp / Shape::lanes, kKept = V > kRowsOfLanes ? V / kRowsOfLanes : 1;
    if (share.owner) {
#pragma unroll
      for (int j = 0; j < kKept; j++) {
        A* const own = sums + warp_ * Shape::positions + position() + share.first + j;
        if constexpr (kCluster == 1) {
          *own = sum[j];
        } else {
#pragma unroll
          for (int r = 0; r < kCluster; r++) *shared_of_rank(own, r) = sum[j];
        }
      }
    }
  }

  // Returns sum_p weight_p x_cp for the channel c = owned_channel(group), one of the rows in `group`.
  __device__ A sum_over_positions(const A (&weight)[V], int group) const {
    A sum[Shape::group];
#pragma unroll
    for (int i = 0; i < Shape::group; i++) {
      sum[i] = A(0);
#pragma unroll
      for (int j = 0; j < V; j++) sum[i] += weight[j] * widen(rows_[group * Shape::group + i].data[j]);
    }
    transposed_sum<Shape::group, 1, Shape::lanes / 2>(sum, lane_);
    return sum[0];
  }

  // The channel whose sum this thread gets from sum_over_positions, or -1 when another lane owns it.
  __device__ int owned_channel(int group) const {
    const int row = segment_ / (Shape::lanes / Shape::group), duplicate = segment_ % (Shape::lanes / Shape::group);
    return duplicate == 0 ? channel(group * Shape::group + row) : -1;
  }

 private:
  int warp_, lane_, segment_, channel_;
  Vector<T, V> rows_[Shape::rows];
};

// Calls body with the RowShape number `tile` of those with accesses of kVector elements.
template <const auto& tiles, int kVector, typename Body, size_t... i>
void with_row_tile(int tile, const Body& body, std::index_sequence<i...>) {
  ((tile == static_cast<int>(i) ? body(RowShape<kVector, tiles[i].lanes, tiles[i].rows, tiles[i].threads>{}) : void()), ...);
}

// Calls body with the RowShape of a plan whose path is rows.
template <typename T, typename Body>
void with_row_shape(const CudaPoolPlan& plan, const Body& body) {
  const auto among = [&]<const auto & tiles, int kVector>() {
    if (plan.vector == kVector) with_row_tile<tiles, kVector>(plan.tile, body, std::make_index_sequence<tiles.size()>());
  };
  among.template operator()<kCudaRowTiles, kWidest<T>>();
  if constexpr (sizeof(T) == 2) among.template operator()<kCudaHalfRowTiles, 4>();
  among.template operator()<kCudaScalarRowTiles, 1>();
}

}  // namespace gcnet_ext::cuda
