// Sums over the positions of a feature map, per sample and channel:
//
//   sum_a = sum_p a_cp      sum_ab = sum_p a_cp b_cp
//
// and, in the backward pass of the fusion, fused = a * scale while a is there. Average pooling is sum_a / P with a = x. The
// backward pass has a = g and b = x. Where the weights of the transform are small, the last block of a sample to finish goes on
// with it, or with its backward pass.
#pragma once

#include <algorithm>

#include "channel_sums_flat.cuh"
#include "channel_sums_items.cuh"

namespace gcnet_ext::cuda {

// The accesses of a and, for products, of b that are under way together. A branch between two of them, such as a test for b,
// would make the second wait for the first.
template <typename T, int V, bool kProducts>
struct SumsAccesses {
  Vector<T, V> a[kCudaSweepUnroll], b[kCudaSweepUnroll];

  // Fetches one access every `hop` positions, from the first of `left` positions on.
  __device__ void fetch(const T* from_a, int64_t stride_a, const T* from_b, int64_t stride_b, int64_t hop, int64_t left) {
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) {
      a[u] = {};
      if (u * hop < left) a[u] = load_vector<V>(from_a + u * hop * stride_a);
    }
    if constexpr (kProducts) {
#pragma unroll
      for (int u = 0; u < kCudaSweepUnroll; u++) {
        b[u] = {};
        if (u * hop < left) b[u] = load_vector<V>(from_b + u * hop * stride_b);
      }
    }
  }
};

template <typename T, int V, typename Scale>
__device__ __forceinline__ void put_fused(T* to, const Vector<T, V>& a, bool scaled, const Scale& scale_of) {
  Vector<T, V> product = a;
#pragma unroll
  for (int j = 0; scaled && j < V; j++) product.data[j] = static_cast<T>(widen(a.data[j]) * scale_of(j));
  store_vector(to, product);
}

// Called by the last block of a sample.
template <typename T>
__device__ void finish_sums(const SumsParams<T>& params, int64_t sample) {
  if (params.after == AfterSums::nothing) return;
  __syncthreads();  // the sums are written, and no thread needs their shared memory any more
  if (params.after == AfterSums::transform) {
    transform_sample(params.transform, sample);
  } else {
    transform_backward_sample(params.transform_grad, sample);
  }
}

// ---- NCHW: lanes of a row, a power of two -------------------------------------------------------------------------------

template <typename A>
struct SumsRowsShared {
  unsigned word;                              // of last_to_arrive
  A of_warps[2 * kCudaSweepThreads / kWarp];  // [warps, 2]: sum_a and sum_ab, for rows that have the lanes of several warps
};

template <typename T, int V, bool kProducts>
__global__ void __launch_bounds__(kCudaSweepThreads, 2) sums_rows(SumsParams<T> params, int lanes) {
  using A = acc_t<T>;
  if (params.next_is_early) let_next_launch_start();
  const int64_t C = params.extent.channels, P = params.extent.positions;
  const int64_t sample = params.first_sample + blockIdx.x / params.blocks_per_sample;
  const int rows = kCudaSweepThreads / lanes, part = threadIdx.x % lanes;
  const int64_t channel = static_cast<int64_t>(blockIdx.x % params.blocks_per_sample) * rows + threadIdx.x / lanes;
  const bool inside = channel < C;
  const T* a = params.a.at(sample, inside ? channel : 0, 0);
  const T* b = kProducts ? params.b.at(sample, inside ? channel : 0, 0) : nullptr;
  T* fused = params.fused.data ? params.fused.at(sample, inside ? channel : 0, 0) : nullptr;
  const A scale = inside && fused ? params.scale.at_or(sample * C + channel, A(1)) : A(1);

  A sum_a = A(0), sum_ab = A(0);
  const int64_t end = inside ? P : 0, hop = static_cast<int64_t>(lanes) * V;
  for (int64_t first = part * V; first < end; first += kCudaSweepUnroll * hop) {
    SumsAccesses<T, V, kProducts> values;
    values.fetch(a + first, 1, kProducts ? b + first : nullptr, 1, hop, end - first);
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) {
#pragma unroll
      for (int j = 0; j < V; j++) {
        sum_a += widen(values.a[u].data[j]);
        if constexpr (kProducts) sum_ab += widen(values.a[u].data[j]) * widen(values.b[u].data[j]);
      }
      const int64_t p = first + u * hop;
      if (fused && p < end) put_fused(fused + p, values.a[u], params.scale.present(), [&](int) { return scale; });
    }
  }

  sum_a = sum_over_lanes(sum_a, 1, (lanes < kWarp ? lanes : kWarp) / 2);
  sum_ab = sum_over_lanes(sum_ab, 1, (lanes < kWarp ? lanes : kWarp) / 2);
  auto& shared = shared_memory<SumsRowsShared<A>>();
  if (lanes > kWarp) {
    const int warp = threadIdx.x / kWarp, warps = lanes / kWarp;
    if (threadIdx.x % kWarp == 0) {
      shared.of_warps[2 * warp] = sum_a;
      shared.of_warps[2 * warp + 1] = sum_ab;
    }
    __syncthreads();
    sum_a = sum_ab = A(0);
    for (int w = 0; w < warps; w++) {
      sum_a += shared.of_warps[2 * (warp / warps * warps + w)];
      sum_ab += shared.of_warps[2 * (warp / warps * warps + w) + 1];
    }
  }
  if (inside && part == 0) params.put(sample, channel, sum_a, sum_ab);
  if (params.arrived && last_to_arrive(params.arrived + sample, params.blocks_per_sample, &shared.word))
    finish_sums(params, sample);
}

template <typename T>
size_t after_sums_shared_bytes(const SumsParams<T>& params) {
  using A = acc_t<T>;
  const int64_t channels = params.extent.channels;
  if (params.after == AfterSums::transform) return shared_bytes<TransformShared<A>>(channels, params.transform.units);
  if (params.after == AfterSums::nothing) return 0;
  return shared_bytes<TransformBackwardShared<A>>(channels, params.transform_grad.forward.units);
}

template <typename T>
void launch_sums_rows(SumsParams<T> params, const CudaShape& shape, cudaStream_t stream) {
  const int vector = cuda_vector(shape), lanes = plan_cuda_row_lanes(shape, vector, tuning());
  const int rows = kCudaSweepThreads / lanes;
  params.blocks_per_sample = static_cast<unsigned>((params.extent.channels + rows - 1) / rows);
  const size_t shared = std::max(shared_bytes<SumsRowsShared<acc_t<T>>>(), after_sums_shared_bytes(params));
  for_sample_ranges(params, params.blocks_per_sample, [&](const SumsParams<T>& range, dim3 blocks) {
    with_vector<T>(vector, [&](auto v) {
      launch(params.b.data ? sums_rows<T, v, true> : sums_rows<T, v, false>, blocks, dim3(kCudaSweepThreads), shared, stream,
             range, lanes);
    });
  });
}

// ---- channels_last: a thread has V channels and goes through positions ------------------------------------------------------

template <typename A>
struct SumsPositionsShared {
  unsigned* word;  // of last_to_arrive
  A* of_rows;      // [2, rows, width]: sum_a and sum_ab

  __host__ __device__ SumsPositionsShared(auto& memory, int rows, int width) {
    memory.take(word, 1);
    memory.take(of_rows, 2 * rows * width);
  }
};

template <typename T, int V, bool kProducts>
__global__ void __launch_bounds__(kCudaSweepThreads, 2) sums_positions(SumsParams<T> params, CudaPositionGrid grid) {
  using A = acc_t<T>;
  if (params.next_is_early) let_next_launch_start();
  const int64_t C = params.extent.channels, P = params.extent.positions;
  const unsigned block = blockIdx.x % params.blocks_per_sample;
  const int64_t sample = params.first_sample + blockIdx.x / params.blocks_per_sample;
  const int64_t split = block / grid.channel_blocks, first_channel = block % grid.channel_blocks * grid.lanes * V;
  const int part = threadIdx.x % grid.lanes, row = threadIdx.x / grid.lanes;
  const int64_t channel = first_channel + part * V;
  const bool inside = row < grid.rows && channel < C;
  const int64_t begin = split * grid.split_positions, end = begin + grid.split_positions < P ? begin + grid.split_positions : P;
  A scale[V], sum_a[V], sum_ab[V];
#pragma unroll
  for (int j = 0; j < V; j++) {
    scale[j] = A(1);
    sum_a[j] = sum_ab[j] = A(0);
  }
  if (inside && params.fused.data && params.scale.present()) params.scale.get(sample * C + channel, scale);
  for (int64_t first = begin + row; inside && first < end; first += kCudaSweepUnroll * grid.rows) {
    SumsAccesses<T, V, kProducts> values;
    values.fetch(params.a.at(sample, channel, first), params.a.position_stride,
                 kProducts ? params.b.at(sample, channel, first) : nullptr, params.b.position_stride, grid.rows, end - first);
#pragma unroll
    for (int u = 0; u < kCudaSweepUnroll; u++) {
#pragma unroll
      for (int j = 0; j < V; j++) {
        sum_a[j] += widen(values.a[u].data[j]);
        if constexpr (kProducts) sum_ab[j] += widen(values.a[u].data[j]) * widen(values.b[u].data[j]);
      }
      const int64_t p = first + u * grid.rows;
      if (params.fused.data && p < end) {
        put_fused(params.fused.at(sample, channel, p), values.a[u], params.scale.present(), [&](int j) { return scale[j]; });
      }
    }
  }

  // The rows of the block are added up, then the splits of the sample, both in their order.
  const int width = grid.lanes * V;
  const auto shared = shared_memory<SumsPositionsShared<A>>(grid.rows, width);
  if (row < grid.rows) {
#pragma unroll
    for (int j = 0; j < V; j++) {
      shared.of_rows[row * width + part * V + j] = sum_a[j];
      shared.of_rows[(grid.rows + row) * width + part * V + j] = sum_ab[j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * width; i += kCudaSweepThreads) {
    const int which = i / width, c = i % width;
    A total = A(0);
    for (int r = 0; r < grid.rows; r++) total += shared.of_rows[(which * grid.rows + r) * width + c];
    if (first_channel + c < C) params.partial[((sample * grid.splits + split) * 2 + which) * C + first_channel + c] = total;
  }
  if (!last_to_arrive(params.arrived + sample, params.blocks_per_sample, shared.word)) return;
  const A* partial = params.partial + sample * grid.splits * 2 * C;
  for (int64_t c = threadIdx.x; c < C; c += kCudaSweepThreads) {
    A total_a = A(0), total_ab = A(0);
    load_ahead<8>(
        0, grid.splits, 1,
        [&](int64_t s) { return Vector<A, 2>{load_fresh(partial + s * 2 * C + c), load_fresh(partial + (s * 2 + 1) * C + c)}; },
        [&](int64_t, const Vector<A, 2>& sums) {
          total_a += sums.data[0];
          total_ab += sums.data[1];
        });
    params.put(sample, c, total_a, total_ab);
  }
  finish_sums(params, sample);
}

template <typename T>
void launch_sums_positions(SumsParams<T> params, const CudaShape& shape, Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  const Extent& extent = params.extent;
  const int vector = cuda_vector(shape);
  const CudaPositionGrid grid = plan_cuda_positions(shape, vector, plan_cuda_most_splits(tuning()));
  params.blocks_per_sample = static_cast<unsigned>(grid.splits * grid.channel_blocks);
  params.partial = workspace.take<A>(extent.samples * grid.splits * 2 * extent.channels);
  const size_t own = shared_bytes<SumsPositionsShared<A>>(grid.rows, grid.lanes * vector);
  const size_t shared = std::max(own, after_sums_shared_bytes(params));
  const auto launch_range = [&](auto kernel) {
    for_sample_ranges(params, params.blocks_per_sample, [&](const SumsParams<T>& range, dim3 blocks) {
      launch(kernel, blocks, dim3(kCudaSweepThreads), shared, stream, range, grid);
    });
  };
  constexpr int V = kWidest<T>;
  if (params.b.data) return launch_range(vector == 1 ? sums_positions<T, 1, true> : sums_positions<T, V, true>);
  launch_range(vector == 1 ? sums_positions<T, 1, false> : sums_positions<T, V, false>);
}

// Sets partial, first_sample and blocks_per_sample of the params; also arrived, if it is null and a block finishes each sample.
// `positive` and `valid` are for sums by items alone: where one is set, the caller has asked sums_by_items().
template <typename T>
void launch_channel_sums(SumsParams<T> params, Workspace& workspace, cudaStream_t stream) {
  const Extent& extent = params.extent;
  if constexpr (!std::is_same_v<T, double>) {
    if (channel_sums_are_flat(params)) return launch_channel_sums_flat(params, stream);
  }
  if (sums_by_items(params)) return launch_sums_items(params, workspace, stream);
  if (!extent.channels_last && params.after == AfterSums::nothing) {
    params.arrived = nullptr;
  } else if (!params.arrived) {
    params.arrived = workspace.zeros(extent.samples, stream);
  }
  const CudaShape shape = common_shape<T>(extent, params.a, params.b, params.fused);
  if (extent.channels_last) return launch_sums_positions(params, shape, workspace, stream);
  launch_sums_rows(params, shape, stream);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_channel_sums)

}  // namespace gcnet_ext::cuda
