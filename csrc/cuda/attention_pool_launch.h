// Host side of attention_pool.cuh and attention_pool_backward.cuh: from a plan to a launch. Shared by the torch glue and the
// emulator.
#pragma once

#include <algorithm>
#include <utility>

#include "attention_pool.cuh"
#include "attention_pool_backward.cuh"
#include "launch.h"

namespace gcnet_ext::cuda {

// What the last block of a sample needs of its shared memory.
template <typename T>
size_t tail_shared_bytes(const PoolParams<T>& params) {
  using A = acc_t<T>;
  const size_t merge = shared_bytes<unsigned>(1) + shared_bytes<A>(params.splits);
  if (!params.transform.in_tail) return merge;
  return std::max(merge, transform_shared_bytes<A>(params.transform.channels, params.transform.units));
}

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

// The path `positions`: warps that share the channels of a position, and groups of them in a block.
struct PositionWarps {
  int warps, all_warps, groups;

  PositionWarps(const Extent& extent, const CudaPoolPlan& plan)
      : warps(static_cast<int>((extent.channels + kWarp * plan.vector - 1) / (kWarp * plan.vector))),
        all_warps(plan.threads / kWarp),
        groups(all_warps / warps) {}
};

// Where not all positions count, the path is `streamed`.
template <typename T>
CudaPoolPlan pool_plan(const CudaMap& map, const Valid<T>& valid) {
  CudaTuning decided = tuning();
  if (valid.data) decided.streamed = 1;
  return plan_cuda_pool(map, decided);
}

// Everything but first_sample and splits of the params is the caller's; arrived is zero.
template <typename T>
void launch_attention_pool(PoolParams<T> params, const CudaPoolPlan& plan, cudaStream_t stream) {
  using A = acc_t<T>;
  params.splits = static_cast<unsigned>(plan.splits);
  const size_t tail = tail_shared_bytes(params);
  const auto launch_blocks = [&](auto kernel, size_t own, auto... arguments) {
    for_sample_ranges(params, params.splits, [&](const PoolParams<T>& range, dim3 grid) {
      launch(kernel, grid, dim3(plan.threads), std::max(own, tail), stream, range, arguments...);
    });
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.path == CudaPoolPath::positions) {
      const PositionWarps block(params.extent, plan);
      const size_t own = shared_bytes<A>(2 * block.all_warps * kCudaPositionsPerWarp) + shared_bytes<A>(2 * block.groups) +
                         shared_bytes<A>(block.groups * params.extent.channels);
      return launch_blocks(plan.vector == 1 ? attention_pool_positions<T, 1> : attention_pool_positions<T, kWidest<T>>, own,
                           block.warps);
    }
    if (plan.path == CudaPoolPath::rows) {
      return with_row_shape<T>(plan, [&](auto shape) {
        using Shape = decltype(shape);
        const size_t own = shared_bytes<A>(Shape::channels) + shared_bytes<A>(Shape::warps * Shape::positions) +
                           shared_bytes<A>(Shape::positions);
        launch_blocks(attention_pool_rows<T, Shape>, own);
      });
    }
  }
  launch_blocks(params.valid.data ? attention_pool_streamed<T, true> : attention_pool_streamed<T, false>,
                shared_bytes<A>(2 * kCudaStreamedThreads));
}

// Everything but first_sample and splits of the params is the caller's.
template <typename T>
void launch_attention_pool_backward(PoolBackwardParams<T> params, const CudaPoolPlan& plan, cudaStream_t stream) {
  using A = acc_t<T>;
  params.splits = static_cast<unsigned>(plan.splits);
  const auto launch_blocks = [&](auto kernel, size_t shared, auto... arguments) {
    for_sample_ranges(params, params.splits, [&](const PoolBackwardParams<T>& range, dim3 grid) {
      launch(kernel, grid, dim3(plan.threads), shared, stream, range, arguments...);
    });
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.path == CudaPoolPath::positions) {
      const PositionWarps block(params.extent, plan);
      const size_t shared = shared_bytes<A>(2 * block.all_warps * kCudaPositionsPerWarp) + shared_bytes<A>(block.all_warps) +
                            shared_bytes<A>(block.groups * params.extent.channels);
      return launch_blocks(
          plan.vector == 1 ? attention_pool_backward_positions<T, 1> : attention_pool_backward_positions<T, kWidest<T>>, shared,
          block.warps);
    }
    if (plan.path == CudaPoolPath::rows) {
      return with_row_shape<T>(plan, [&](auto shape) {
        using Shape = decltype(shape);
        const size_t shared = 3 * shared_bytes<A>(Shape::channels) + shared_bytes<A>(Shape::warps * Shape::positions) +
                              3 * shared_bytes<A>(Shape::positions) + shared_bytes<A>(Shape::warps);
        launch_blocks(attention_pool_backward_rows<T, Shape>, shared);
      });
    }
  }
  launch_blocks(params.valid.data ? attention_pool_backward_streamed<T, true> : attention_pool_backward_streamed<T, false>,
                shared_bytes<A>(2 * kCudaStreamedThreads) + shared_bytes<A>(kCudaStreamedThreads / kWarp));
}

}  // namespace gcnet_ext::cuda
