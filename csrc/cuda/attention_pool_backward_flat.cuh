// The backward pass of attention pooling by pieces of whole rows (attention_pool_backward.cuh, flat_rows.cuh), in two launches:
// the sums u of every piece (flat_position_sums.cuh), and this one, in which a block adds up the u of a sample and writes the dx
// of its pieces and their part of dw, which is that of the whole sample because a channel is in one piece.
#pragma once

#include "attention_pool_backward_split.cuh"
#include "flat_position_sums.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PoolBackwardFlatShared {
  Vector<T, kWidest<T>>*x, *grad;
  float *scale, *grad_context, *weight;  // [rows], and one more
  float *attention, *grad_logit;         // [P]
  uint8_t* counts;                       // [P]
  float* dots;                           // [warps]

  __host__ __device__ PoolBackwardFlatShared(auto& memory, const FlatPieces& pieces) {
    const int accesses = stage_accesses<T>(pieces);
    memory.take(x, accesses);
    memory.take(grad, accesses);
    memory.take(scale, pieces.rows + 1);
    memory.take(grad_context, pieces.rows + 1);
    memory.take(weight, pieces.rows + 1);
    memory.take(attention, pieces.positions);
    memory.take(grad_logit, pieces.positions);
    memory.take(counts, pieces.positions);
    memory.take(dots, kFlatWarps);
  }
};

// The maps of the launch. An absent map has no data; x is absent where nobody needs dw.
template <typename T>
struct PoolBackwardFlatMaps {
  FlatMap<const T> x, grad;
  FlatMap<T> grad_x;
};

// What belongs to the positions of a sample. Contains a barrier.
template <typename T>
__device__ __forceinline__ void find_position_factors(const PoolBackwardParams<T>& params, const float* partial,
                                                      const FlatPieces& pieces, int64_t sample,
                                                      const PoolBackwardFlatShared<T>& shared) {
  const float dot = context_dot(params, sample, shared.dots);
  for (int p = threadIdx.x; p < pieces.positions; p += kFlatThreads) {
    const bool counts = params.valid.counts(sample, p);
    const float attention = params.attention[sample * pieces.positions + p];
    const float grad_logit = attention * (sum_of_pieces(partial, pieces, sample, p) - dot);
    shared.counts[p] = counts;
    shared.attention[p] = counts ? attention : 0.f;
    shared.grad_logit[p] = counts ? grad_logit : 0.f;
  }
}

// dw_c = sum_p dl_p (x_cp - context_c) for the rows of a piece.
template <typename T>
__device__ __forceinline__ void put_grad_weight(const PoolBackwardParams<T>& params, const FlatPieces& pieces,
                                                const FlatPiece& piece, const PoolBackwardFlatShared<T>& shared) {
  const int64_t first = piece.sample * pieces.channels + piece.first_row;
  float sum = 0.f;
  for (int p = threadIdx.x % kWarp; p < pieces.positions; p += kWarp) sum += shared.grad_logit[p];
  sum = warp_sum(sum);
  with_row_access(pieces, [&](auto width, auto lanes) {
    sum_products<width, lanes>(
        reinterpret_cast<const T*>(shared.x), shared.grad_logit, piece.rows, pieces.positions,
        [&](int row, float total) { params.partial[first + row] = total - sum * params.context[first + row]; });
  });
}

// dx_cp = g_cp s_c + m_p dctx_c + dl_p w_c, or g_cp s_c at a position that does not count.
template <bool kValid, typename T>
__device__ __forceinline__ void put_grad_x(const FlatMap<T>& grad_x, bool has_grad, const FlatPieces& pieces,
                                           const FlatPiece& piece, const PoolBackwardFlatShared<T>& shared) {
  constexpr int V = kWidest<T>;
  const FlatColumns own(pieces.unit() / V);
  T* const to = grad_x.at(piece);
  const int elements = piece.rows * pieces.positions, accesses = accesses_of<T>(elements);
  for (int column = own.column; column < own.columns; column += kFlatThreads) {
    const FlatColumn<V> place(column, pieces.positions);
    PositionFactors<float> at[V];
    uint32_t in_first_row[V];
    bool counts[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      const int p = place.position_of(j);
      at[j] = {shared.attention[p], shared.grad_logit[p]};
      in_first_row[j] = place.in_first_row(j);
      counts[j] = !kValid || shared.counts[p];
    }
    int row = own.group * pieces.unit_rows + place.row;
    for (int a = own.group * own.columns + column; a < accesses; a += own.groups * own.columns) {
      Vector<T, V> values = {};
      if (has_grad) values = shared.grad[a];
      const auto factors = [&](int r) {
        return ChannelFactors<float>{shared.scale[r], shared.grad_context[r], shared.weight[r]};
      };
      const ChannelFactors<float> first = factors(row), second = factors(row + 1);
#pragma unroll
      for (int j = 0; j < V; j++) {
        const auto of_row = [&](float of_first, float of_second) { return blend(in_first_row[j], of_first, of_second); };
        const ChannelFactors<float> of_channel{of_row(first.scale, second.scale),
                                               of_row(first.grad_context, second.grad_context),
                                               of_row(first.weight, second.weight)};
        const float grad = widen(values.data[j]);
        values.data[j] = static_cast<T>(counts[j] ? of_channel.grad_x(grad, at[j]) : grad * of_channel.scale);
      }
      if (grad_x.wide && (a + 1) * V <= elements) {
        store_vector(to + a * V, values);
      } else {
#pragma unroll
        for (int j = 0; j < V; j++) {
          if (a * V + j < elements) store(to + a * V + j, values.data[j]);
        }
      }
      row += own.groups * pieces.unit_rows;
    }
  }
}

// A block goes from its last piece to its first, because the caches have most of what the previous launch read last.
template <typename T>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks)
    attention_pool_backward_flat(PoolBackwardParams<T> params, PoolBackwardFlatMaps<T> maps, const float* partial,
                                 FlatPieces pieces) {
  const auto shared = shared_memory<PoolBackwardFlatShared<T>>(pieces);
  const auto copy = [&](unsigned item) {
    if (maps.x.data) copy_piece(shared.x, maps.x, pieces.at(item));
    if (maps.grad.data) copy_piece(shared.grad, maps.grad, pieces.at(item));
  };
  const unsigned begin = pieces.bound(blockIdx.x), end = pieces.bound(blockIdx.x + 1);
  copy(end - 1);
  wait_for_previous_launch();
  // Not before that wait: the next launch reads results of earlier launches of the transform, and does not wait for them.
  if (params.next_is_early) let_next_launch_start();
  int64_t merged = -1;
  for (unsigned item = end; item-- > begin;) {
    const FlatPiece piece = pieces.at(item);
    for (int r = threadIdx.x; r <= pieces.rows; r += kFlatThreads) {
      const bool there = r < piece.rows;
      const int c = piece.first_row + r;
      const int64_t of_sample = piece.sample * pieces.channels + c;
      shared.scale[r] = there && params.scale ? params.scale[of_sample] : 1.f;
      shared.grad_context[r] = there ? params.grad_context[of_sample] : 0.f;
      shared.weight[r] = there ? params.weight.at(c) : 0.f;
    }
    if (piece.sample != merged) {
      merged = piece.sample;
      find_position_factors(params, partial, pieces, merged, shared);
    }
    wait_for_copies();
    __syncthreads();
    if (maps.x.data) {
      if (params.valid.data) {
        clear_uncounted(reinterpret_cast<T*>(shared.x), shared.counts, piece.rows, pieces.positions);
        __syncthreads();
      }
      put_grad_weight(params, pieces, piece, shared);
    }
    if (maps.grad_x.data) {
      const bool has_grad = maps.grad.data != nullptr;
      if (params.valid.data) {
        put_grad_x<true>(maps.grad_x, has_grad, pieces, piece, shared);
      } else {
        put_grad_x<false>(maps.grad_x, has_grad, pieces, piece, shared);
      }
    }
    __syncthreads();
    if (item > begin) copy(item - 1);
  }
}

template <typename T>
bool flat_pool_backward_fits(const Extent& extent) {
  const FlatPieces pieces(extent, sizeof(T));
  const size_t shared = std::max(shared_bytes<PositionSumsShared<T>>(pieces), shared_bytes<PoolBackwardFlatShared<T>>(pieces));
  return items_fit(shared, extent.samples * pieces.pieces);
}

// partial has room for the sums u [N, pieces, P]; params.partial, unless it is absent, for dw [N, C].
template <typename T>
void launch_attention_pool_backward_flat(const PoolBackwardParams<T>& params, float* partial, cudaStream_t stream) {
  const FlatPieces pieces(params.extent, sizeof(T));
  const FlatMap<const T> x(params.x, params.extent);
  PoolBackwardFlatMaps<T> maps;
  if (params.partial) maps.x = x;
  if (params.grad_x.data) {
    maps.grad = FlatMap<const T>(params.grad, params.extent);
    maps.grad_x = FlatMap<T>(params.grad_x, params.extent);
  }
  launch_flat_position_sums<T>({x, {}, params.grad_context, partial}, pieces, stream);
  launch_items(attention_pool_backward_flat<T>, pieces.items, kFlatBlocks, kFlatThreads,
               shared_bytes<PoolBackwardFlatShared<T>>(pieces), /*early=*/true, stream, params, maps,
               static_cast<const float*>(partial), pieces);
}

}  // namespace gcnet_ext::cuda
