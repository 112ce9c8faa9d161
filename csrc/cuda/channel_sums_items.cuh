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

// The work on a piece. A thread has kCudaSweepUnroll accesses of it: of one row, or in channels_last of V channels.
template <typename T, bool kChannelsLast>
class SumsItems {
  using A = acc_t<T>;
  static constexpr int V = kWidest<T>, kAccesses = kCudaSweepUnroll;
  static constexpr int kSums = kChannelsLast ? V : 4;  // of a thread: each of its channels, or so many that few additions wait

 public:
  using Stage = Vector<T, V>;

  // `items`: of the launch. In shared memory: the stages of a and b [accesses][threads], in which a thread has places of its own,
  // and what SumsItemsShared has of sums.
  __device__ SumsItems(const SumsParams<T>& params, const CudaSumsItems& cut, unsigned items, Stage* a_stage, Stage* b_stage,
                       A* shared_a, A* shared_ab)
      : params_(params),
        cut_(cut),
        items_(items),
        splits_(static_cast<unsigned>(cut.splits)),
        groups_(static_cast<unsigned>(cut.channel_groups)),
        a_stage_(a_stage),
        b_stage_(b_stage),
        shared_a_(shared_a),
        shared_ab_(shared_ab),
        part_(threadIdx.x % cut.lanes),
        row_(threadIdx.x / cut.lanes),
        own_(kChannelsLast ? row_ : part_ * V),
        hop_(kChannelsLast ? cut.rows : cut.lanes * V),
        width_(kChannelsLast ? cut.lanes * V : cut.rows),
        in_group_(kChannelsLast ? part_ * V : row_) {}

  __device__ bool there(const SumsPlace& at) const { return at.item < items_; }
  __device__ SumsPlace begin(unsigned item) const {
    const int64_t first = static_cast<int64_t>(item / groups_ % splits_) * cut_.split_positions;
    const int64_t end = first + cut_.split_positions, positions = params_.extent.positions;
    return {item, first, end < positions ? end : positions};
  }
  // The piece behind this one, if this one is not the last of its item.
  __device__ SumsPlace next(const SumsPlace& at) const {
    return {at.item, at.first + kAccesses * static_cast<int64_t>(hop_), at.end};
  }
  __device__ bool last_of_item(const SumsPlace& at) const { return next(at).first >= at.end; }

  __device__ void copy_a(const SumsPlace& at) const {
    if (there(at)) copy_map(a_stage_, params_.a, at);
  }
  __device__ void copy_b(const SumsPlace& at) const {
    if (there(at) && params_.b.data) copy_map(b_stage_, params_.b, at);
  }

  // Takes the piece from the stages and calls copy_next(), for which they are free then.
  template <typename CopyNext>
  __device__ void work_on(const SumsPlace& at, const CopyNext& copy_next) {
    const bool products = params_.b.data, masked = params_.positive || params_.valid.data;
    const unsigned bits = masked ? mask(at) : 0;  // these loads, too, are waited for while the copies are on their way
    wait_for_copies();
    Vector<T, V> a[kAccesses], b[kAccesses] = {};
#pragma unroll
    for (int u = 0; u < kAccesses; u++) {
      a[u] = a_stage_[u * kCudaSweepThreads + threadIdx.x];
      if (products) b[u] = b_stage_[u * kCudaSweepThreads + threadIdx.x];
    }
#pragma unroll
    for (int u = 0; u < kAccesses; u++) {
      hide_from_optimizer(a[u]);  // the values have arrived
      hide_from_optimizer(b[u]);
    }
    copy_next();
#pragma unroll
    for (int u = 0; u < kAccesses; u++) {
#pragma unroll
      for (int j = 0; masked && j < V; j++) a[u].data[j] = bits >> (u * V + j) & 1 ? a[u].data[j] : T(0.0f);
      const int64_t p = at.first + own_ + u * hop_;
      if (params_.fused.data && has_channel(at) && p < at.end)
        store_vector(params_.fused.at(sample_of(at), channel_of(at), p), a[u]);
#pragma unroll
      for (int j = 0; j < V; j++) {
        sum_a_[j % kSums] += widen(a[u].data[j]);
        sum_ab_[j % kSums] += widen(a[u].data[j]) * widen(b[u].data[j]);
      }
    }
  }

  // Behind the last piece of an item: its sums.
  __device__ void end_item(const SumsPlace& at) {
    if constexpr (kChannelsLast) {
      add_up_rows(at);
    } else {
      add_up_lanes(at);
    }
#pragma unroll
    for (int j = 0; j < kSums; j++) sum_a_[j] = sum_ab_[j] = A(0);
  }

 private:
  __device__ int64_t sample_of(const SumsPlace& at) const { return at.item / (splits_ * groups_); }
  __device__ int64_t channel_of(const SumsPlace& at) const {
    return static_cast<int64_t>(at.item % groups_) * width_ + in_group_;
  }
  __device__ bool has_channel(const SumsPlace& at) const {
    return row_ < cut_.rows && channel_of(at) < params_.extent.channels;
  }

  __device__ void copy_map(Stage* stage, const Map<const T>& map, const SumsPlace& at) const {
    const bool inside = has_channel(at);
    const T* from = map.at(sample_of(at), channel_of(at), at.first + own_);
    const int64_t step = hop_ * (kChannelsLast ? map.position_stride : 1);
#pragma unroll
    for (int u = 0; u < kAccesses; u++)
      copy_later(stage + u * kCudaSweepThreads + threadIdx.x, from + u * step, inside && at.first + own_ + u * hop_ < at.end);
  }

  // A bit for every element of this thread's accesses: whether it counts.
  __device__ unsigned mask(const SumsPlace& at) const {
    unsigned bits = 0;
    if (!has_channel(at)) return bits;
    const int64_t C = params_.extent.channels, P = params_.extent.positions, sample = sample_of(at), channel = channel_of(at);
    for (int u = 0; u < kAccesses; u++) {
      const int64_t p = at.first + own_ + u * hop_;
      if (p >= at.end) break;
      unsigned of_access = (1u << V) - 1;
      if (params_.positive) {
        const int64_t bit_row = kChannelsLast ? sample * P + p : sample * C + channel, column = kChannelsLast ? channel : p;
        of_access &= load(params_.positive + bit_row * (((kChannelsLast ? C : P) + 7) / 8) + column / 8) >> column % 8;
      }
      for (int j = 0; params_.valid.data && j < V; j++) {
        if (!params_.valid.at(sample, kChannelsLast ? p : p + j)) of_access &= ~(1u << j);
      }
      bits |= of_access << (u * V);
    }
    return bits;
  }

  __device__ void put(const SumsPlace& at, int64_t channel, A total_a, A total_ab) const {
    const int64_t sample = sample_of(at), C = params_.extent.channels;
    if (splits_ > 1) {
      A* const partial = params_.partial + static_cast<int64_t>(at.item / groups_) * 2 * C + channel;
      partial[0] = total_a;
      partial[C] = total_ab;
      return;
    }
    params_.put(sample, channel, params_.valid.data ? total_a * params_.valid.shares[sample] : total_a, total_ab);
  }

  __device__ void add_up_rows(const SumsPlace& at) const {
    __syncthreads();  // no thread needs the sums of the item before any more
    if (row_ < cut_.rows) {
#pragma unroll
      for (int j = 0; j < V; j++) {
        shared_a_[row_ * width_ + in_group_ + j] = sum_a_[j];
        shared_ab_[row_ * width_ + in_group_ + j] = sum_ab_[j];
      }
    }
    __syncthreads();
    const int64_t channel = channel_of(at) - in_group_ + threadIdx.x;
    if (static_cast<int>(threadIdx.x) >= width_ || channel >= params_.extent.channels) return;
    A total_a = A(0), total_ab = A(0);
    for (int r = 0; r < cut_.rows; r++) {
      total_a += shared_a_[r * width_ + threadIdx.x];
      total_ab += shared_ab_[r * width_ + threadIdx.x];
    }
    put(at, channel, total_a, total_ab);
  }

  __device__ void add_up_lanes(const SumsPlace& at) const {
    A total_a = A(0), total_ab = A(0);
#pragma unroll
    for (int j = 0; j < kSums; j++) {
      total_a += sum_a_[j];
      total_ab += sum_ab_[j];
    }
    total_a = sum_over_lanes(total_a, 1, (cut_.lanes < kWarp ? cut_.lanes : kWarp) / 2);
    total_ab = sum_over_lanes(total_ab, 1, (cut_.lanes < kWarp ? cut_.lanes : kWarp) / 2);
    if (cut_.lanes > kWarp) {
      const int warp = threadIdx.x / kWarp, warps = cut_.lanes / kWarp;
      __syncthreads();  // no thread needs the sums of the item before any more
      if (threadIdx.x % kWarp == 0) {
        shared_a_[warp] = total_a;
        shared_ab_[warp] = total_ab;
      }
      __syncthreads();
      total_a = total_ab = A(0);
      for (int w = row_ * warps; w < (row_ + 1) * warps; w++) {
        total_a += shared_a_[w];
        total_ab += shared_ab_[w];
      }
    }
    if (part_ == 0 && has_channel(at)) put(at, channel_of(at), total_a, total_ab);
  }

  const SumsParams<T>& params_;
  const CudaSumsItems& cut_;
  const unsigned items_, splits_, groups_;
  Stage *const a_stage_, *const b_stage_;
  A *const shared_a_, *const shared_ab_;
  const int part_, row_;
  const int own_;       // the first position of this thread in a piece
  const int hop_;       // positions from one of its accesses to the next
  const int width_;     // channels of a group
  const int in_group_;  // the first channel of this thread in its group
  A sum_a_[kSums] = {}, sum_ab_[kSums] = {};
};

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kCudaSweepThreads, kSumsItemBlocks<kChannelsLast>)
    sums_items(SumsParams<T> params, CudaSumsItems cut, unsigned items) {
  if (params.next_is_early) let_next_launch_start();
  auto& shared = shared_memory<SumsItemsShared<T, kChannelsLast>>();
  SumsItems<T, kChannelsLast> work(params, cut, items, shared.a, shared.b, shared.sum_a, shared.sum_ab);
  SumsPlace at = work.begin(blockIdx.x);
  const auto copy = [&](const SumsPlace& place) {
    work.copy_a(place);
    work.copy_b(place);
  };
  copy(at);
  while (work.there(at)) {
    const bool last = work.last_of_item(at);
    const SumsPlace next = last ? work.begin(at.item + gridDim.x) : work.next(at);
    work.work_on(at, [&] { copy(next); });
    if (last) work.end_item(at);
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
