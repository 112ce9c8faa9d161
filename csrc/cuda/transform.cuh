// The transform of the block. Its two branches, scale and shift, read the same context:
//
//   hidden = w1 context + b1      t = w2 act(norm(hidden)) + b2      or, without a w2, t = hidden
//   gate = sigmoid(t_scale)       shift = t_shift          scale = gate
//
// With a hard sigmoid, gate = alpha t_scale + beta and scale = clip(gate, 0, 1): the gate still tells whether t_scale is beyond
// a corner. There are C channels, and H hidden units of a branch; the hidden units of scale come before those of shift.
// transform_sample is the transform of one sample by one block; transform_batched.cuh and transform_split.cuh have that of many.
#pragma once

#include "activation.cuh"
#include "memory_access.h"
#include "parameter.cuh"
#include "reduce.cuh"
#include "shared_memory.cuh"

namespace gcnet_ext::cuda {

constexpr int kBranches = 2, kScale = 0, kShift = 1;

template <typename T>
struct BranchParams {
  Parameter<T> w1, b1, norm_weight, norm_bias, w2, b2;  // w1 [H, C], w2 [C, H]
  int64_t units = 0;                                    // H; 0 when the branch is absent
  int64_t first_unit = 0;                               // where its hidden units begin
};

template <typename T>
struct TransformParams {
  using A = acc_t<T>;
  BranchParams<T> branch[kBranches];
  int64_t channels = 0, units = 0;  // units: of both branches
  bool norm = false, hard_sigmoid = false;
  ActivationFunction<A> activation;
  A eps = 0, gate_alpha = 0, gate_beta = 0;
  const A* context = nullptr;  // [N, C]
  A* hidden = nullptr;         // [N, units]
  A* gate = nullptr;           // [N, C]
  A* scale = nullptr;          // [N, C], of a hard sigmoid; otherwise it is the gate
  A* shift = nullptr;          // [N, C]
  bool in_tail = false;        // whether the block that completes a sample's context transforms it
  int64_t samples = 0;         // N; transform_sample does not read it

  // The scale of the fusion, [N, C].
  A* scale_values() const { return hard_sigmoid ? scale : gate; }

  // Writes the gate and scale, or the shift, of a channel from its t.
  __device__ void put(int branch, int64_t sample, int64_t channel, A t) const {
    if (branch == kShift) {
      shift[sample * channels + channel] = t;
      return;
    }
    const A value = hard_sigmoid ? gate_alpha * t + gate_beta : A(1) / (A(1) + exponential(-t));
    gate[sample * channels + channel] = value;
    if (hard_sigmoid) scale[sample * channels + channel] = clip(value, A(0), A(1));
  }
};

// Calls body with the values of a matrix in their own type.
template <typename T, typename Body>
__device__ __forceinline__ void with_values(const Parameter<T>& matrix, const Body& body) {
  if (matrix.is_float32) {
    body(static_cast<const float*>(matrix.data));
  } else {
    body(static_cast<const T*>(matrix.data));
  }
}

// The columns in one access of a matrix, if every row is aligned to it.
constexpr int kMatrixVector = 4;

template <typename W>
__device__ __forceinline__ bool vector_rows(const W* matrix, int64_t columns) {
  return columns % kMatrixVector == 0 && reinterpret_cast<uintptr_t>(matrix) % (kMatrixVector * sizeof(W)) == 0;
}

// A lane works on kAffineRows rows together, with kAffineSteps accesses of each under way.
constexpr int kAffineRows = 4;
template <typename W>
constexpr int kAffineSteps = sizeof(W) == 2   ? 4
                             : sizeof(W) == 4 ? 2
                                              : 1;

// A weight matrix whose rows follow one another.
template <typename W>
struct Rows {
  const W* data;
  int64_t rows, columns;
};

// Adds to sum[i] the terms of row (first_row + i*hop) . input that belong to lane `part` of `lanes`.
template <int V, typename A, typename W>
__device__ __forceinline__ void partial_dots(const Rows<W>& matrix, int64_t first_row, int64_t hop, const A* input, int part,
                                             int lanes, A (&sum)[kAffineRows]) {
  constexpr int kSteps = kAffineSteps<W>;
  for (int64_t first = part * V; first < matrix.columns; first += kSteps * lanes * V) {
    Vector<W, V> values[kSteps][kAffineRows];
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const int64_t k = first + step * lanes * V;
#pragma unroll
      for (int i = 0; i < kAffineRows; i++) {
        const int64_t row = first_row + i * hop;
        values[step][i] = {};
        if (k < matrix.columns && row < matrix.rows) {
          values[step][i] = load_vector<V>(matrix.data + row * matrix.columns + k);
        }
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const int64_t k = first + step * lanes * V;
      if (k >= matrix.columns) break;
#pragma unroll
      for (int j = 0; j < V; j++) {
#pragma unroll
        for (int i = 0; i < kAffineRows; i++) sum[i] += static_cast<A>(values[step][i].data[j]) * input[k + j];
      }
    }
  }
}

// The whole block calls put(row, sum_k matrix[row, k] input_k + bias_row) for all rows. A row has as few lanes as it takes for
// all rows to be worked on at once.
template <typename T, typename Put>
__device__ __forceinline__ void affine_by_block(const Parameter<T>& matrix, const Parameter<T>& bias, int64_t rows,
                                                int64_t columns, const acc_t<T>* input, const Put& put) {
  using A = acc_t<T>;
  const int threads = blockDim.x;
  int lanes = kWarp;
  while (lanes > 1 && (threads / lanes * kAffineRows < rows || lanes / 2 * kMatrixVector >= columns)) lanes /= 2;
  const int part = threadIdx.x % lanes, groups = threads / lanes;
  for (int64_t start = 0; start < rows; start += groups * kAffineRows) {
    const int64_t first_row = start + threadIdx.x / lanes;
    A sum[kAffineRows] = {};
    const auto add = [&](const auto* values) {
      const Rows<std::remove_cvref_t<decltype(*values)>> all{values, rows, columns};
      if (vector_rows(values, columns)) {
        partial_dots<kMatrixVector>(all, first_row, groups, input, part, lanes, sum);
      } else {
        partial_dots<1>(all, first_row, groups, input, part, lanes, sum);
      }
    };
    with_values(matrix, add);
#pragma unroll
    for (int i = 0; i < kAffineRows; i++) {
      const int64_t row = first_row + i * groups;
      sum[i] = sum_over_lanes(sum[i], 1, lanes / 2);
      if (row < rows && part == 0) put(row, sum[i] + bias.at_or(row, A(0)));
    }
  }
}

// Mean and 1 / standard deviation of one sample's hidden units of a branch; 0 and 1 without a norm.
template <typename A>
struct NormStatistics {
  A mean = A(0), inverse_std = A(1);
};

template <typename T, typename Load>
__device__ __forceinline__ NormStatistics<acc_t<T>> statistics_by_warp(const TransformParams<T>& params, int64_t units,
                                                                       const Load& hidden) {
  using A = acc_t<T>;
  NormStatistics<A> statistics;
  if (!params.norm) return statistics;
  const int lane = threadIdx.x % kWarp;
  A sum = A(0), squares = A(0);
  for (int64_t j = lane; j < units; j += kWarp) sum += hidden(j);
  statistics.mean = warp_sum(sum) / static_cast<A>(units);
  for (int64_t j = lane; j < units; j += kWarp) {
    const A centred = hidden(j) - statistics.mean;
    squares += centred * centred;
  }
  statistics.inverse_std = A(1) / sqrt(warp_sum(squares) / static_cast<A>(units) + params.eps);
  return statistics;
}

// The argument of the activation, z = normalised*norm_weight + norm_bias.
template <typename T>
__device__ __forceinline__ acc_t<T> norm_affine(const TransformParams<T>& params, const BranchParams<T>& branch, int64_t unit,
                                                acc_t<T> normalised) {
  using A = acc_t<T>;
  return params.norm ? normalised * branch.norm_weight.at_or(unit, A(1)) + branch.norm_bias.at_or(unit, A(0)) : normalised;
}

// Returns act(norm(hidden)) of one unit.
template <bool kReluOrSilu, typename T>
__device__ __forceinline__ acc_t<T> activate(const TransformParams<T>& params, const BranchParams<T>& branch, int64_t unit,
                                             acc_t<T> hidden, const NormStatistics<acc_t<T>>& statistics) {
  const acc_t<T> normalised = (hidden - statistics.mean) * statistics.inverse_std;
  return params.activation.template value<kReluOrSilu>(norm_affine(params, branch, unit, normalised));
}

// One warp computes act(norm(hidden)) of all units of a sample and branch.
template <bool kReluOrSilu, typename T, typename Load>
__device__ __forceinline__ void activate_by_warp(const TransformParams<T>& params, const BranchParams<T>& branch,
                                                 const Load& hidden, acc_t<T>* activated) {
  const auto statistics = statistics_by_warp(params, branch.units, hidden);
  for (int64_t j = threadIdx.x % kWarp; j < branch.units; j += kWarp) {
    activated[j] = activate<kReluOrSilu>(params, branch, j, hidden(j), statistics);
  }
}

template <typename A>
struct TransformShared {
  A* context;             // [channels]
  A *hidden, *activated;  // [units]

  __host__ __device__ TransformShared(auto& memory, int64_t channels, int64_t units) {
    memory.take(context, channels);
    memory.take(hidden, units);
    memory.take(activated, units);
  }
};

// One block computes the transform of one sample, with a ReLU or SiLU. Other blocks of the launch may have written its context.
template <typename T>
__device__ void transform_sample(const TransformParams<T>& params, int64_t sample) {
  using A = acc_t<T>;
  const auto shared = shared_memory<TransformShared<A>>(params.channels, params.units);
  load_ahead<4>(
      threadIdx.x, params.channels, blockDim.x,
      [&](int64_t c) { return load_fresh(params.context + sample * params.channels + c); },
      [&](int64_t c, A value) { shared.context[c] = value; });
  __syncthreads();
#pragma unroll 1
  for (int layer = 0; layer < 2; layer++) {
#pragma unroll 1
    for (int b = 0; b < kBranches; b++) {
      const BranchParams<T>& branch = params.branch[b];
      if (layer == 1 && !branch.w2.present()) continue;
      const int64_t rows = layer == 0 ? branch.units : params.channels, columns = layer == 0 ? params.channels : branch.units;
      affine_by_block(layer == 0 ? branch.w1 : branch.w2, layer == 0 ? branch.b1 : branch.b2, rows, columns,
                      layer == 0 ? shared.context : shared.activated + branch.first_unit, [&](int64_t row, A value) {
                        if (layer == 0) {
                          shared.hidden[branch.first_unit + row] = value;
                          params.hidden[sample * params.units + branch.first_unit + row] = value;
                        }
                        if (layer == 1 || !branch.w2.present()) params.put(b, sample, row, value);
                      });
    }
    if (layer == 1) break;
    __syncthreads();
    for (int b = threadIdx.x / kWarp; b < kBranches; b += blockDim.x / kWarp) {
      const BranchParams<T>& branch = params.branch[b];
      const A* of_branch = shared.hidden + branch.first_unit;
      if (branch.w2.present())
        activate_by_warp<true>(params, branch, [&](int64_t j) { return of_branch[j]; }, shared.activated + branch.first_unit);
    }
    __syncthreads();
  }
}

}  // namespace gcnet_ext::cuda
