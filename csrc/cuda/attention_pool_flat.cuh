// Attention pooling by pieces of whole rows (attention_pool.cuh, flat_rows.cuh), in two launches: the sums over the channels of
// every piece (flat_position_sums.cuh), and this one, in which a block adds up the logits of a sample, takes their softmax, and
// finds the context of the rows of its pieces, which it reads from the second-level cache. No splits are left to be merged.
#pragma once

#include "attention_pool_split.cuh"
#include "flat_position_sums.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct PoolFlatShared {
  Vector<T, kWidest<T>>* stages;  // [2, accesses]: of this piece and the next one
  float *logits, *exponentials;   // [P]; exponentials are relative to the maximum
  uint8_t* counts;                // [P]
  float* of_warps;                // [warps]: sums of the exponentials

  __host__ __device__ PoolFlatShared(auto& memory, const FlatPieces& pieces) {
    memory.take(stages, 2 * stage_accesses<T>(pieces));
    memory.take(logits, pieces.positions);
    memory.take(exponentials, pieces.positions);
    memory.take(counts, pieces.positions);
    memory.take(of_warps, kFlatWarps);
  }
};

// Puts the logits of a sample, and which positions count, into shared memory.
template <typename T>
__device__ __forceinline__ void merge_logits(const PoolParams<T>& params, const FlatPieces& pieces, int64_t sample, float bias,
                                             const PoolFlatShared<T>& shared) {
  for (int p = threadIdx.x; p < pieces.positions; p += kFlatThreads) {
    const bool counts = params.valid.counts(sample, p);
    const float logit = bias + sum_of_pieces(params.partial, pieces, sample, p);
    shared.counts[p] = counts;
    shared.logits[p] = counts ? logit : lowest<float>();
  }
}

// The exponentials of the logits, and the sum of those of every warp.
template <typename T>
__device__ __forceinline__ void exponentials_of_logits(const FlatPieces& pieces, const PoolFlatShared<T>& shared) {
  const int lane = threadIdx.x % kWarp;
  float maximum = lowest<float>(), sum = 0.f;
  for (int p = lane; p < pieces.positions; p += kWarp) maximum = larger(maximum, shared.logits[p]);
  const float reference = softmax_reference(warp_max(maximum));
  for (int p = threadIdx.x; p < pieces.positions; p += kFlatThreads)
    sum += shared.exponentials[p] = exponential(shared.logits[p] - reference);
  sum = warp_sum(sum);
  if (lane == 0) shared.of_warps[threadIdx.x / kWarp] = sum;
}

// The share of a piece in the attention of its sample. If all positions count, it does not read the counts, which another thread
// may be writing for the next sample.
template <typename T>
__device__ __forceinline__ void write_attention(const PoolParams<T>& params, const FlatPieces& pieces, const FlatPiece& piece,
                                                float inverse, const PoolFlatShared<T>& shared) {
  float* const attention = params.attention + piece.sample * pieces.positions;
  const int pieces_of_sample = static_cast<int>(pieces.pieces),
            each = (pieces.positions + pieces_of_sample - 1) / pieces_of_sample;
  const int begin = piece.number * each, left = pieces.positions - begin, count = left < each ? left : each;
  for (int p = begin + static_cast<int>(threadIdx.x); p < begin + count; p += kFlatThreads)
    attention[p] = !params.valid.data || shared.counts[p] ? shared.exponentials[p] * inverse : 0.f;
}

// A block goes from its last piece to its first, because the caches have most of what the previous launch read last.
template <typename T>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks)
    attention_pool_flat(PoolParams<T> params, FlatMap<const T> x, FlatPieces pieces) {
  let_next_launch_start();
  const auto shared = shared_memory<PoolFlatShared<T>>(pieces);
  const unsigned begin = pieces.bound(blockIdx.x), end = pieces.bound(blockIdx.x + 1);
  Vector<T, kWidest<T>>*stage = shared.stages, *next = stage + stage_accesses<T>(pieces);
  copy_piece(stage, x, pieces.at(end - 1));
  const float bias = params.bias.at_or(0, 0.f);
  wait_for_previous_launch();
  int64_t merged = -1;
  for (unsigned item = end; item-- > begin;) {
    const FlatPiece piece = pieces.at(item);
    if (piece.sample != merged) {
      merged = piece.sample;
      merge_logits(params, pieces, merged, bias, shared);
      __syncthreads();
      exponentials_of_logits(pieces, shared);
    }
    wait_for_copies();
    __syncthreads();
    if (item > begin) copy_piece(next, x, pieces.at(item - 1));
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kFlatWarps; w++) sum += shared.of_warps[w];
    const float inverse = params.valid.data && params.valid.shares[piece.sample] == 0.f ? 0.f : 1.f / sum;
    if (params.attention) write_attention(params, pieces, piece, inverse, shared);
    T* const rows = reinterpret_cast<T*>(stage);
    if (params.valid.data) {
      clear_uncounted(rows, shared.counts, piece.rows, pieces.positions);
      __syncthreads();
    }
    float* const context = params.context + piece.sample * pieces.channels + piece.first_row;
    with_row_access(pieces, [&](auto width, auto lanes) {
      sum_products<width, lanes>(rows, shared.exponentials, piece.rows, pieces.positions,
                                 [&](int row, float total) { context[row] = total * inverse; });
    });
    std::swap(stage, next);
  }
}

template <typename T>
bool flat_pool_fits(const Extent& extent) {
  const FlatPieces pieces(extent, sizeof(T));
  const size_t shared = std::max(shared_bytes<PositionSumsShared<T>>(pieces), shared_bytes<PoolFlatShared<T>>(pieces));
  return items_fit(shared, extent.samples * pieces.pieces);
}

// params.partial has room for [N, pieces, P].
template <typename T>
void launch_attention_pool_flat(const PoolParams<T>& params, cudaStream_t stream) {
  const FlatPieces pieces(params.extent, sizeof(T));
  const FlatMap<const T> x(params.x, params.extent);
  launch_flat_position_sums<T>({x, params.weight, nullptr, params.partial}, pieces, stream);
  launch_items(attention_pool_flat<T>, pieces.items, kFlatBlocks, kFlatThreads, shared_bytes<PoolFlatShared<T>>(pieces),
               /*early=*/true, stream, params, x, pieces);
}

}  // namespace gcnet_ext::cuda
