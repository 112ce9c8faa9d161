// The sums over the positions of a feature map (channel_sums.cuh) by pieces of whole rows (flat_rows.cuh).
#pragma once

#include "channel_sums_params.cuh"
#include "flat_rows.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct SumsFlatShared {
  Vector<T, kWidest<T>>*a, *b;  // b of products only

  __host__ __device__ SumsFlatShared(auto& memory, const FlatPieces& pieces, bool products) {
    const int accesses = stage_accesses<T>(pieces);
    memory.take(a, accesses);
    memory.take(b, products ? accesses : 0);
  }
};

template <bool kProducts, int W, int kLanes, typename T>
__device__ __forceinline__ void sums_of_rows(const SumsParams<T>& params, const FlatPieces& pieces, const FlatPiece& piece,
                                             const SumsFlatShared<T>& shared) {
  constexpr int kSums = 1 + kProducts, kTogether = kFlatRowsTogether;
  const T *const a = reinterpret_cast<const T*>(shared.a), *const b = reinterpret_cast<const T*>(shared.b);
  sum_rows<W, kLanes, kSums>(
      piece.rows, pieces.positions,
      [&](float(&sums)[kTogether][kSums], const int(&start)[kTogether], int p) {
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
          const auto of_a = neighbours<W>(a + start[i] + p);
          Vector<T, W> of_b = {};
          if constexpr (kProducts) of_b = neighbours<W>(b + start[i] + p);
#pragma unroll
          for (int j = 0; j < W; j++) {
            sums[i][0] += widen(of_a.data[j]);
            if constexpr (kProducts) sums[i][1] += widen(of_a.data[j]) * widen(of_b.data[j]);
          }
        }
      },
      [&](int row, const float(&sums)[kSums]) {
        params.put(piece.sample, piece.first_row + row, sums[0], kProducts ? sums[kProducts] : 0.f);
      });
}

template <typename T, bool kProducts>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks)
    sums_flat(SumsParams<T> params, FlatMap<const T> a, FlatMap<const T> b, FlatPieces pieces) {
  if (params.next_is_early) let_next_launch_start();
  const auto shared = shared_memory<SumsFlatShared<T>>(pieces, kProducts);
  const auto copy = [&](unsigned item) {
    copy_piece(shared.a, a, pieces.at(item));
    if constexpr (kProducts) copy_piece(shared.b, b, pieces.at(item));
  };
  const unsigned end = pieces.bound(blockIdx.x + 1);
  unsigned item = pieces.bound(blockIdx.x);
  copy(item);
  for (; item < end; item++) {
    const FlatPiece piece = pieces.at(item);
    wait_for_copies();
    __syncthreads();
    with_row_access(pieces,
                    [&](auto width, auto lanes) { sums_of_rows<kProducts, width, lanes>(params, pieces, piece, shared); });
    __syncthreads();
    if (item + 1 < end) copy(item + 1);
  }
}

// Whether these sums are taken by pieces, and by nothing else on the way.
template <typename T>
bool channel_sums_are_flat(const SumsParams<T>& params) {
  const Extent& extent = params.extent;
  const bool plain = params.after == AfterSums::nothing && !params.fused.data && !params.positive && !params.valid.data;
  if (!plain || !takes_flat_stages<T>(extent, params.a, params.b)) return false;
  const FlatPieces pieces(extent, sizeof(T));
  return items_fit(shared_bytes<SumsFlatShared<T>>(pieces, params.b.data != nullptr), extent.samples * pieces.pieces);
}

template <typename T>
void launch_channel_sums_flat(const SumsParams<T>& params, cudaStream_t stream) {
  const FlatPieces pieces(params.extent, sizeof(T));
  const bool products = params.b.data != nullptr;
  launch_items(products ? sums_flat<T, true> : sums_flat<T, false>, pieces.items, kFlatBlocks, kFlatThreads,
               shared_bytes<SumsFlatShared<T>>(pieces, products), /*early=*/false, stream, params,
               FlatMap<const T>(params.a, params.extent), FlatMap<const T>(params.b, params.extent), pieces);
}

}  // namespace gcnet_ext::cuda
