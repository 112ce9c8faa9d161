// What the kernels of the fusion share (channel_fuse.cuh): its operands, and how NCHW maps lie in memory together.
#pragma once

#include "../plan_cuda.h"
#include "final_relu.cuh"
#include "parameter.cuh"
#include "valid_positions.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct FuseParams {
  using A = acc_t<T>;
  Map<const T> x;  // absent: 0
  Map<T> out;      // dense
  Extent extent;
  Parameter<T> scale = {}, shift = {};  // [N, C]; absent: 1 and 0
  A shift_factor = 1;                   // a factor of shift
  int64_t first_tile = 0;               // of this launch, in the order of the walk

  // The factors of row n*C + c. An absent shift is -0, because x + -0 is x even for x = -0.
  struct Factors {
    A scale, shift;
    __device__ T operator()(T x) const { return static_cast<T>(multiply_add(widen(x), scale, shift)); }
  };
  __device__ Factors factors(int64_t row) const {
    return {scale.at_or(row, A(1)), shift.present() ? shift.at(row) * shift_factor : -A(0)};
  }
};

// The fusion with all of its operands.
template <typename T>
struct Fusion : FuseParams<T> {
  Map<const T> residual = {};   // absent: 0
  bool relu = false;            // act is a ReLU
  Valid<T> valid = {};          // the positions that count get their share of the shift, and the others get none
  uint8_t* positive = nullptr;  // gets the bits of the ReLU (final_relu.cuh), where it is not null
  // Whether the launch before this one lets it start early. Scale, shift and the shares of valid may come from launches that
  // are not over then; x, the residual and valid may not.
  bool early = false;

  bool needs_elements() const { return residual.data || relu || valid.data; }
};

// A piece of kElements of a stretch of memory in which rows of P elements touch.
template <int kElements>
struct RowPiece {
  int64_t positions, row, position;  // P; the place where the piece begins

  struct Place {
    int64_t row, position;
  };

  __device__ RowPiece(int64_t first_element, int64_t positions)
      : positions(positions), row(first_element / positions), position(first_element % positions) {}

  // The place of an element of the piece. Only pieces of many rows need the division.
  __device__ Place at(int element) const {
    const int64_t after = position + element;
    if (after < positions) return {row, after};
    if (positions >= kElements) return {row + 1, after - positions};
    const unsigned rows = static_cast<unsigned>(after) / static_cast<unsigned>(positions);
    return {row + rows, after - rows * positions};
  }
};

// NCHW maps that are walked together lie in `count` stretches of memory with `rows` rows of P elements each: in one stretch if
// all samples touch, otherwise in one for each sample.
struct RowSegments {
  int64_t count, rows;
  bool wide;  // whether the rows of all maps touch, and accesses of 16 bytes may begin wherever they do in the stretch
};

template <typename T>
bool rows_touch(const Extent& extent, const Map<T>& map) {
  return !map.data || extent.channels == 1 || map.channel_stride == extent.positions;
}

template <typename T, typename... Maps>
RowSegments row_segments(const Extent& extent, const Maps&... maps) {
  constexpr int V = kWidest<T>;
  const int64_t samples = extent.samples, plane = extent.channels * extent.positions;
  const bool touch = (rows_touch(extent, maps) && ...);
  const bool dense = touch && ((!maps.data || samples == 1 || maps.sample_stride == plane) && ...);
  const auto starts_aligned = [&](const auto& map) {
    return reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && (dense || samples == 1 || map.sample_stride % V == 0);
  };
  return {dense ? 1 : samples, dense ? samples * extent.channels : extent.channels,
          touch && extent.positions >= V && (starts_aligned(maps) && ...)};
}

}  // namespace gcnet_ext::cuda
