// The sums over the positions of a feature map (channel_sums.cuh) by items (items.cuh): the next piece of a and b is on its way
// while a block sums one. An item has a group of channels of a split of a sample (plan_cuda_sums_items). Where a sample has
// several splits, each leaves its part of the sums, and a launch after this one adds these up in their order.
#pragma once

#include "channel_sums_params.cuh"
#include "elements.cuh"
#include "items.cuh"
#include "reduce.cuh"
#include "shared_memory.cuh"

namespace gcnet_ext::cuda {

// Blocks of a multiprocessor. In channels_last a thread has sums of several channels, for which three blocks leave no registers.
template <bool kChannelsLast>
constexpr int kSumsItemBlocks = kChannelsLast ? 2 : 3;

template <typename T, bool kChannelsLast>
struct SumsItemsShared {
  static constexpr int kOfThread = kChannelsLast ? kWidest<T> : 1;
  Vector<T, kWidest<T>> a[kCudaSweepUnroll * kCudaSweepThreads], b[kCudaSweepUnroll * kCudaSweepThreads];  // the next piece
  acc_t<T> sum_a[kOfThread * kCudaSweepThreads], sum_ab[kOfThread * kCudaSweepThreads];
};

// Where a block is: at the piece of its item that begins at position `first`.
struct SumsPlace {
  unsigned item;
  int64_t first, end;  // end: of the split
};

// A thread has kCudaSweepUnroll accesses of a piece: of one row, or in channels_last of V channels.
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kCudaSweepThreads, kSumsItemBlocks<kChannelsLast>)
    sums_items(SumsParams<T> params, CudaSumsItems cut, unsigned items) {
  using A = acc_t<T>;
  if (params.next_is_early) let_next_launch_start();
  constexpr int V = kWidest<T>, kAccesses = kCudaSweepUnroll;
  auto& shared = shared_memory<SumsItemsShared<T, kChannelsLast>>();
  const int64_t C = params.extent.channels, P = params.extent.positions;
  const unsigned splits = static_cast<unsigned>(cut.splits), groups = static_cast<unsigned>(cut.channel_groups);
  const int part = threadIdx.x % cut.lanes, row = threadIdx.x / cut.lanes;
  const int own = kChannelsLast ? row : part * V;              // the first position of this thread in a piece
  const int hop = kChannelsLast ? cut.rows : cut.lanes * V;    // positions from one of its accesses to the next
  const int width = kChannelsLast ? cut.lanes * V : cut.rows;  // channels of a group
  const int in_group = kChannelsLast ? part * V : row;         // the first channel of this thread in its group
  const bool products = params.b.data, masked = params.positive || params.valid.data;

  const auto sample_of = [&](const SumsPlace& at) { return static_cast<int64_t>(at.item / (splits * groups)); };
  const auto channel_of = [&](const SumsPlace& at) { return static_cast<int64_t>(at.item % groups) * width + in_group; };
  const auto has_channel = [&](const SumsPlace& at) { return row < cut.rows && channel_of(at) < C; };
  const auto begin = [&](unsigned item) {
    const int64_t first = static_cast<int64_t>(item / groups % splits) * cut.split_positions;
    const int64_t end = first + cut.split_positions;
    return SumsPlace{item, first, end < P ? end : P};
  };
  const auto copy = [&](const SumsPlace& at) {
    if (at.item >= items) return;
    const int64_t sample = sample_of(at), channel = channel_of(at);
    const bool inside = has_channel(at);
    const auto copy_map = [&](Vector<T, V>* stage, const Map<const T>& map) {
      const T* from = map.at(sample, channel, at.first + own);
      const int64_t step = hop * (kChannelsLast ? map.position_stride : 1);
#pragma unroll
      for (int u = 0; u < kAccesses; u++)
        copy_later(stage + u * kCudaSweepThreads + threadIdx.x, from + u * step, inside && at.first + own + u * hop < at.end);
    };
    copy_map(shared.a, params.a);
    if (products) copy_map(shared.b, params.b);
  };
  // A bit for every element of this thread's accesses: whether it counts.
  const auto mask = [&](const SumsPlace& at) {
    unsigned bits = 0;
    if (!has_channel(at)) return bits;
    const int64_t sample = sample_of(at), channel = channel_of(at);
    for (int u = 0; u < kAccesses; u++) {
      const int64_t p = at.first + own + u * hop;
      if (p >= at.end) break;
      unsigned of_access = (1u << V) - 1;
      if (params.positive) {
        const int64_t bit_row = kChannelsLast ? sample * P + p : sample * C + channel, column = kChannelsLast ? channel : p;
        of_access &= load(params.positive + bit_row * (((kChannelsLast ? C : P) + 7) / 8) + column / 8) >> column % 8;
      }
      for (int j = 0; params.valid.data && j < V; j++) {
        if (!params.valid.at(sample, kChannelsLast ? p : p + j)) of_access &= ~(1u << j);
      }
      bits |= of_access << (u * V);
    }
    return bits;
  };
  const auto put = [&](const SumsPlace& at, int64_t channel, A total_a, A total_ab) {
    const int64_t sample = sample_of(at);
    if (splits > 1) {
      A* const partial = params.partial + static_cast<int64_t>(at.item / groups) * 2 * C + channel;
      partial[0] = total_a;
      partial[C] = total_ab;
      return;
    }
    params.put(sample, channel, params.valid.data ? total_a * params.valid.shares[sample] : total_a, total_ab);
  };

  constexpr int kSums = kChannelsLast ? V : 4;  // of a thread: each of its channels, or so many that few additions wait
  A sum_a[kSums] = {}, sum_ab[kSums] = {};
  SumsPlace at = begin(blockIdx.x);
  copy(at);
  while (at.item < items) {
    const unsigned bits = masked ? mask(at) : 0;  // these loads, too, are waited for while the copies are on their way
    wait_for_copies();
    Vector<T, V> a[kAccesses], b[kAccesses] = {};
#pragma unroll
    for (int u = 0; u < kAccesses; u++) {
      a[u] = shared.a[u * kCudaSweepThreads + threadIdx.x];
      if (products) b[u] = shared.b[u * kCudaSweepThreads + threadIdx.x];
    }
#pragma unroll
    for (int u = 0; u < kAccesses; u++) {
      hide_from_optimizer(a[u]);  // the values have arrived
      hide_from_optimizer(b[u]);
    }
    SumsPlace next = at;
    next.first += kAccesses * static_cast<int64_t>(hop);
    const bool last = next.first >= at.end;
    if (last) next = begin(at.item + gridDim.x);
    copy(next);
#pragma unroll
    for (int u = 0; u < kAccesses; u++) {
#pragma unroll
      for (int j = 0; masked && j < V; j++) a[u].data[j] = bits >> (u * V + j) & 1 ? a[u].data[j] : T(0.0f);
      const int64_t p = at.first + own + u * hop;
      if (params.fused.data && has_channel(at) && p < at.end)
        store_vector(params.fused.at(sample_of(at), channel_of(at), p), a[u]);
#pragma unroll
      for (int j = 0; j < V; j++) {
        sum_a[j % kSums] += widen(a[u].data[j]);
        sum_ab[j % kSums] += widen(a[u].data[j]) * widen(b[u].data[j]);
      }
    }
    if (last) {
      if constexpr (kChannelsLast) {
        __syncthreads();  // no thread needs the sums of the item before any more
        if (row < cut.rows) {
#pragma unroll
          for (int j = 0; j < V; j++) {
            shared.sum_a[row * width + in_group + j] = sum_a[j];
            shared.sum_ab[row * width + in_group + j] = sum_ab[j];
          }
        }
        __syncthreads();
        const int64_t channel = channel_of(at) - in_group + threadIdx.x;
        if (static_cast<int>(threadIdx.x) < width && channel < C) {
          A total_a = A(0), total_ab = A(0);
          for (int r = 0; r < cut.rows; r++) {
            total_a += shared.sum_a[r * width + threadIdx.x];
            total_ab += shared.sum_ab[r * width + threadIdx.x];
          }
          put(at, channel, total_a, total_ab);
        }
      } else {
        A total_a = A(0), total_ab = A(0);
#pragma unroll
        for (int j = 0; j < kSums; j++) {
          total_a += sum_a[j];
          total_ab += sum_ab[j];
        }
        total_a = sum_over_lanes(total_a, 1, (cut.lanes < kWarp ? cut.lanes : kWarp) / 2);
        total_ab = sum_over_lanes(total_ab, 1, (cut.lanes < kWarp ? cut.lanes : kWarp) / 2);
        if (cut.lanes > kWarp) {
          const int warp = threadIdx.x / kWarp, warps = cut.lanes / kWarp;
          __syncthreads();  // no thread needs the sums of the item before any more
          if (threadIdx.x % kWarp == 0) {
            shared.sum_a[warp] = total_a;
            shared.sum_ab[warp] = total_ab;
          }
          __syncthreads();
          total_a = total_ab = A(0);
          for (int w = row * warps; w < (row + 1) * warps; w++) {
            total_a += shared.sum_a[w];
            total_ab += shared.sum_ab[w];
          }
        }
        if (part == 0 && has_channel(at)) put(at, channel_of(at), total_a, total_ab);
      }
#pragma unroll
      for (int j = 0; j < kSums; j++) sum_a[j] = sum_ab[j] = A(0);
    }
    at = next;
  }
}

// ---- the splits of a sample ----------------------------------------------------------------------------------------------------

constexpr int kSumsMergeShares = 4;  // lanes that share the splits of a channel
constexpr int kSumsMergeChannels = kCudaSweepThreads / kSumsMergeShares;

template <typename T>
__global__ void __launch_bounds__(kCudaSweepThreads) sums_merge(SumsParams<T> params, unsigned splits, unsigned blocks) {
  using A = acc_t<T>;
  constexpr int kChannels = kWarp / kSumsMergeShares;  // of a warp
  if (params.next_is_early) let_next_launch_start();
  const int64_t C = params.extent.channels, sample = blockIdx.x / blocks;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, share = lane / kChannels;
  const int64_t channel = blockIdx.x % blocks * kSumsMergeChannels + warp * kChannels + lane % kChannels;
  const A* const partial = params.partial + sample * splits * 2 * C + channel;
  wait_for_previous_launch();
  A total_a = A(0), total_ab = A(0);
  load_ahead<16>(
      share, channel < C ? splits : 0, kSumsMergeShares,
      [&](int64_t s) { return Vector<A, 2>{load_fresh(partial + s * 2 * C), load_fresh(partial + (s * 2 + 1) * C)}; },
      [&](int64_t, const Vector<A, 2>& sums) {
        total_a += sums.data[0];
        total_ab += sums.data[1];
      });
  total_a = sum_over_lanes(total_a, kChannels, kWarp / 2);
  total_ab = sum_over_lanes(total_ab, kChannels, kWarp / 2);
  if (share > 0 || channel >= C) return;
  params.put(sample, channel, params.valid.data ? total_a * params.valid.shares[sample] : total_a, total_ab);
}

// ---- the launches ------------------------------------------------------------------------------------------------------------

// Whether these sums run by items. Maps for the flat stages do not, whatever else the sums have to do: what is masked or written
// beside them must not decide in which order they are taken.
template <typename T>
bool sums_by_items(const SumsParams<T>& params) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const CudaShape shape = common_shape<T>(params.extent, params.a, params.b, params.fused);
    if (!tuning().by_items() || params.after != AfterSums::nothing || cuda_vector(shape) != kWidest<T>) return false;
    if (plan_cuda_flat(shape, tuning())) return false;
    if (params.fused.data && params.scale.data) return false;
    const CudaSumsItems cut = plan_cuda_sums_items(shape, tuning());
    return items_fit(shared_bytes<SumsItemsShared<T, true>>(), params.extent.samples * cut.splits * cut.channel_groups);
  }
}

template <typename T>
void launch_sums_items(SumsParams<T> params, Workspace& workspace, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    const Extent& extent = params.extent;
    const CudaSumsItems cut = plan_cuda_sums_items(common_shape<T>(extent, params.a, params.b, params.fused), tuning());
    const int64_t items = extent.samples * cut.splits * cut.channel_groups;
    if (items == 0) return;
    const bool next_is_early = params.next_is_early;
    if (cut.splits > 1) {
      params.partial = workspace.take<acc_t<T>>(extent.samples * cut.splits * 2 * extent.channels);
      params.next_is_early = true;
    }
    const auto launch_kernel = [&](auto channels_last) {
      constexpr bool kChannelsLast = channels_last;
      launch_items(sums_items<T, kChannelsLast>, items, kSumsItemBlocks<kChannelsLast>, kCudaSweepThreads,
                   shared_bytes<SumsItemsShared<T, kChannelsLast>>(), /*early=*/false, stream, params, cut,
                   static_cast<unsigned>(items));
    };
    if (extent.channels_last) {
      launch_kernel(std::true_type{});
    } else {
      launch_kernel(std::false_type{});
    }
    if (cut.splits == 1) return;
    params.next_is_early = next_is_early;
    const unsigned blocks = static_cast<unsigned>((extent.channels + kSumsMergeChannels - 1) / kSumsMergeChannels);
    launch_early(sums_merge<T>, dim3(static_cast<unsigned>(extent.samples * blocks)), dim3(kCudaSweepThreads), 0, stream,
                 params, static_cast<unsigned>(cut.splits), blocks);
  }
}

}  // namespace gcnet_ext::cuda
