// How the stages of transform_split.cuh and transform_split_backward.cuh cut their work, and how a warp of theirs multiplies rows
// of weights with a vector of each of its samples. The matrices are small (plan_cuda_transform_split): an int counts all weights.
#pragma once

#include "launch.h"
#include "transform.cuh"

namespace gcnet_ext::cuda {

constexpr int kSplitThreads = 256, kSplitWarps = kSplitThreads / kWarp;
constexpr int kSplitBlocks = 2;                          // on a multiprocessor
constexpr int kSplitSamples = kSplitWarps;               // of a block, at most: the norm of each is a warp's
constexpr int kSplitRows = 4;                            // of a matrix, per warp
constexpr int kSplitRowTile = kSplitWarps * kSplitRows;  // per block, in each turn
constexpr int kSplitColumns = 4;                         // of each row, per lane
constexpr int kSplitStep = kWarp * kSplitColumns;        // columns that a warp multiplies at a time
constexpr int kSliceChannels = static_cast<int>(kCudaMostSliceChannels);

constexpr int split_tiles(int64_t count, int64_t tile) { return static_cast<int>((count + tile - 1) / tile); }
constexpr int whole_vectors(int64_t count) { return split_tiles(count, kSplitColumns) * kSplitColumns; }

// What each slice of the channels adds to a vector of every sample: values [N, slices, width], in which those of shift are behind
// those of scale. The parts of a branch begin with a whole vector.
struct SliceParts {
  float* values = nullptr;
  int slices = 0, slice_channels = 0, width = 0, first_of_shift = 0;

  SliceParts(int64_t channels, int64_t of_scale, int64_t of_shift) {
    const CudaTransformSlices cut = plan_cuda_transform_slices(channels);
    slices = static_cast<int>(cut.slices);
    slice_channels = static_cast<int>(cut.channels);
    first_of_shift = whole_vectors(of_scale);
    width = first_of_shift + whole_vectors(of_shift);
  }
  __device__ float* of(int64_t sample, int slice, int branch) const {
    return values + (sample * slices + slice) * width + (branch == kShift ? first_of_shift : 0);
  }
  // Adds up the parts of kCount neighbours in the order of the slices.
  template <int kCount>
  __device__ Vector<float, kCount> sum(int64_t sample, int branch, int first) const {
    Vector<float, kCount> total = {};
    load_ahead<8>(
        0, slices, 1,
        [&](int64_t slice) { return load_fresh_vector<kCount>(of(sample, static_cast<int>(slice), branch) + first); },
        [&](int64_t, const Vector<float, kCount>& part) {
#pragma unroll
          for (int i = 0; i < kCount; i++) total.data[i] += part.data[i];
        });
    return total;
  }
};

// How the work of a launch is dealt to its blocks: a block has `together` samples, one slice, and one tile of the rows or columns
// of a branch. A tile of rows has kSplitRowTile of them for each turn.
struct SplitWork {
  int tiles[kBranches] = {};
  int slices = 1, turns = 1, together = 1;

  SplitWork(int64_t samples, int slices, int tiles_of_scale, int tiles_of_shift, bool in_turns,
            int most_together = kSplitSamples)
      : slices(slices) {
    const int64_t slots = static_cast<int64_t>(multiprocessors()) * kSplitBlocks;
    together = std::min(most_together, plan_cuda_samples_together(samples, slices * (tiles_of_scale + tiles_of_shift), slots));
    const int branches = (tiles_of_scale > 0) + (tiles_of_shift > 0), most = std::max(tiles_of_scale, tiles_of_shift);
    const int64_t pieces = static_cast<int64_t>(split_tiles(samples, together)) * slices * branches;
    if (in_turns) turns = static_cast<int>(plan_cuda_pieces(pieces, most, slots));
    tiles[kScale] = split_tiles(tiles_of_scale, turns);
    tiles[kShift] = split_tiles(tiles_of_shift, turns);
  }
  __host__ __device__ int tiles_of_both() const { return tiles[kScale] + tiles[kShift]; }
  __host__ __device__ int places() const { return slices * tiles_of_both(); }  // of the samples of a block
  dim3 grid(int64_t samples) const {
    return dim3(static_cast<unsigned>(static_cast<int64_t>(split_tiles(samples, together)) * slices * tiles_of_both()));
  }
};

struct SplitPlace {
  int64_t first_sample;
  int samples, branch, slice, tile;
  int share;  // the number of this place among those of its samples
  // Of the block. It is hidden, because the compiler would keep in registers what depends on it alone, in a ticketed launch
  // (tickets.cuh) throughout all stages.
  int thread = static_cast<int>(threadIdx.x);

  __device__ SplitPlace(const SplitWork& work, int64_t all_samples, unsigned number) {
    hide_from_optimizer(thread);
    const unsigned tiles = work.tiles_of_both(), places = work.slices * tiles;
    first_sample = static_cast<int64_t>(number / places) * work.together;
    share = static_cast<int>(number % places);
    slice = share / static_cast<int>(tiles);
    const int of_both = share % static_cast<int>(tiles);
    branch = of_both < work.tiles[kScale] ? kScale : kShift;
    tile = branch == kScale ? of_both : of_both - work.tiles[kScale];
    const int64_t left = all_samples - first_sample;
    samples = left < work.together ? static_cast<int>(left) : work.together;
  }
  __device__ int lane() const { return thread % kWarp; }
  // The first row of this warp.
  __device__ int first_row(const SplitWork& work, int turn) const {
    return ((tile * work.turns + turn) * kSplitWarps + thread / kWarp) * kSplitRows;
  }
};

// The columns from begin on, `width` of them, of a weight matrix.
template <typename T>
struct WeightSlice {
  const Parameter<T>& matrix;
  int rows, columns, begin, width;

  // Asks for the weights of a warp in all turns and steps but the first, because it fetches those after it has waited.
  __device__ void prefetch_later(const SplitPlace& place, const SplitWork& work) const {
    with_values(matrix, [&](const auto* values) {
#pragma unroll 1
      for (int turn = 0; turn < work.turns; turn++) {
        const int first_row = place.first_row(work, turn);
#pragma unroll 1
        for (int k = place.lane() * kSplitColumns + (turn == 0 ? kSplitStep : 0); k < width; k += kSplitStep) {
#pragma unroll 1
          for (int r = 0; r < kSplitRows && first_row + r < rows; r++) prefetch(values + (first_row + r) * columns + begin + k);
        }
      }
    });
  }
};

// kSplitRows rows and kSplitStep columns of a weight matrix, as they lie in memory, so that nothing waits for them yet.
template <typename T>
struct WeightRows {
  Vector<unsigned, kSplitColumns> bits[kSplitRows];
  int lane;
  bool is_float32 = false;

  __device__ explicit WeightRows(const SplitPlace& place) : lane(place.lane()) {}

  // Past the last row and the last column there are zeros.
  __device__ void fetch(const WeightSlice<T>& from, int first_row, int step) {
    is_float32 = sizeof(T) == sizeof(float) || from.matrix.is_float32;
    with_values(from.matrix, [&](const auto* values) {
      using W = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
      const bool vectors = vector_rows(values, from.columns);  // slices begin at whole vectors
      const int k = step * kSplitStep + lane * kSplitColumns;
      const W* const start = values + first_row * from.columns + from.begin + k;
#pragma unroll
      for (int r = 0; r < kSplitRows; r++) {
        Vector<W, kSplitColumns> row = {};
        if (first_row + r < from.rows && k < from.width) {
          if (vectors) {
            row = load_vector<kSplitColumns>(start + r * from.columns);
          } else {
#pragma unroll
            for (int j = 0; j < kSplitColumns; j++) {
              if (k + j < from.width) row.data[j] = load(start + r * from.columns + j);
            }
          }
        }
        keep(row, bits[r]);
      }
    });
  }
  // Adds the products with `width` values of each sample to sum[row][sample].
  template <int kSamples>
  __device__ void multiply(const float* staged, int stride, int width, float (&sum)[kSplitRows * kSamples]) const {
    const int k = lane * kSplitColumns;
    if (k >= width) return;
    float weights[kSplitRows][kSplitColumns];
    if (sizeof(T) == sizeof(float) || is_float32) {
      widen_rows<float>(weights);
    } else {
      widen_rows<T>(weights);
    }
#pragma unroll
    for (int s = 0; s < kSamples; s++) {
      const auto input = *reinterpret_cast<const Vector<float, kSplitColumns>*>(staged + s * stride + k);
#pragma unroll
      for (int r = 0; r < kSplitRows; r++) {
#pragma unroll
        for (int j = 0; j < kSplitColumns; j++) sum[r * kSamples + s] += weights[r][j] * input.data[j];
      }
    }
  }

 private:
  template <typename W>
  __device__ static void keep(const Vector<W, kSplitColumns>& row, Vector<unsigned, kSplitColumns>& kept) {
    if constexpr (sizeof(W) == sizeof(unsigned)) {
      kept = __builtin_bit_cast(Vector<unsigned, kSplitColumns>, row);
    } else if constexpr (sizeof(W) == sizeof(short)) {
      const auto half = __builtin_bit_cast(Vector<unsigned, kSplitColumns / 2>, row);
      kept.data[0] = half.data[0];
      kept.data[1] = half.data[1];
    }
  }
  template <typename W>
  __device__ void widen_rows(float (&weights)[kSplitRows][kSplitColumns]) const {
#pragma unroll
    for (int r = 0; r < kSplitRows; r++) {
      if constexpr (sizeof(W) == sizeof(float)) {
#pragma unroll
        for (int j = 0; j < kSplitColumns; j++) weights[r][j] = __builtin_bit_cast(float, bits[r].data[j]);
      } else {
        const auto row =
            __builtin_bit_cast(Vector<W, kSplitColumns>, Vector<unsigned, kSplitColumns / 2>{bits[r].data[0], bits[r].data[1]});
#pragma unroll
        for (int j = 0; j < kSplitColumns; j++) weights[r][j] = widen(row.data[j]);
      }
    }
  }
};

// A warp multiplies kSplitRows rows in each turn with the staged values of each of up to kSamples samples, and calls put(row,
// sample, value). The weights of its first turn and step have been fetched.
template <int kSamples, typename T, typename Put>
__device__ __forceinline__ void multiply_rows(const WeightSlice<T>& from, WeightRows<T>& weights, const SplitPlace& place,
                                              const SplitWork& work, const float* staged, int stride, const Put& put) {
#pragma unroll 1
  for (int turn = 0; turn < work.turns; turn++) {
    float sum[kSplitRows * kSamples] = {};
#pragma unroll 1
    for (int step = 0; step * kSplitStep < from.width; step++) {
      if (turn + step > 0) weights.fetch(from, place.first_row(work, turn), step);
      weights.template multiply<kSamples>(staged + step * kSplitStep, stride, from.width - step * kSplitStep, sum);
    }
    const Share share = transposed_sum<kSplitRows * kSamples, 1, kWarp / 2>(sum, place.lane());
    const int row = place.first_row(work, turn) + share.first / kSamples, sample = share.first % kSamples;
    if (share.owner && row < from.rows && sample < place.samples) put(row, place.first_sample + sample, sum[0]);
  }
}

// Asks for the vectors of a branch, which the launch will need after its wait.
template <typename T>
__device__ __forceinline__ void prefetch_vectors(const BranchParams<T>& branch, int64_t channels) {
  constexpr int kEach = 16;  // elements; a line of the cache has 32 or 64
  const auto ask = [](const Parameter<T>& vector, int64_t count) {
    if (!vector.present()) return;
    with_values(vector, [&](const auto* values) {
#pragma unroll 1
      for (int64_t i = threadIdx.x * kEach; i < count; i += kSplitThreads * kEach) prefetch(values + i);
    });
  };
  ask(branch.b1, branch.units);
  ask(branch.norm_weight, branch.units);
  ask(branch.norm_bias, branch.units);
  ask(branch.b2, channels);
}

}  // namespace gcnet_ext::cuda
