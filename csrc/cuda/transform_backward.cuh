// The backward pass of the transform, with the symbols of transform.cuh, from grad_shift = sum_p g and grad_gate = sum_p g x:
//
//   grad_t_scale = grad_gate gate'(t_scale)             grad_t_shift = grad_shift             (by channel_sums.cuh)
//   grad_activated = w2^T grad_t                        grad_z = grad_activated act'(z), z = norm_weight normalised + norm_bias
//   grad_hidden = the gradient through the norm         grad_context = sum over branches of w1^T grad_hidden
//
// Without a w2, grad_hidden is grad_t. The gradients of the parameters are sums over the samples of products of these
// (parameter_gradients.cuh).
#pragma once

#include "../plan_cuda.h"
#include "transform.cuh"

namespace gcnet_ext::cuda {

template <typename T>
struct TransformGradParams {
  using A = acc_t<T>;
  TransformParams<T> forward;
  const A* grad_t[kBranches] = {};  // [N, C]
  A* grad_context = nullptr;        // [N, C]
  A* activated = nullptr;           // [N, units]; so are grad_hidden, grad_z and grad_norm_weight
  A* grad_hidden = nullptr;
  A* grad_z = nullptr;
  A* grad_norm_weight = nullptr;  // grad_z normalised
  // For transform_batched.cuh alone:
  A* grad_activated = nullptr;  // [N, batch_chunks(C), units]
  unsigned* arrived = nullptr;  // zero before the launch, for every tile of samples
};

// Returns grad gate'(t), computed from the gate. Beyond its corners a hard sigmoid is flat, and passes no gradient, not even a
// NaN.
template <typename T>
__device__ __forceinline__ acc_t<T> gate_backward(const TransformParams<T>& params, acc_t<T> gate, acc_t<T> grad) {
  using A = acc_t<T>;
  if (params.hard_sigmoid) return gate >= A(0) && gate <= A(1) ? grad * params.gate_alpha : A(0);
  return grad * gate * (A(1) - gate);
}

// One warp computes grad_hidden of a sample and branch from grad_activated, and the values that parameter_gradients.cuh adds
// up, which it keeps for their sums if `keeps`. The warp needs grad_z [units of the branch] to itself.
template <bool kReluOrSilu, typename T, typename Load, typename LoadGrad, typename Put>
__device__ __forceinline__ void activate_backward_by_warp(const TransformGradParams<T>& params, int64_t sample,
                                                          const BranchParams<T>& branch, const Load& hidden,
                                                          const LoadGrad& grad_activated, acc_t<T>* grad_z_of, bool keeps,
                                                          const Put& put_grad_hidden) {
  using A = acc_t<T>;
  const TransformParams<T>& forward = params.forward;
  const int64_t first = sample * forward.units + branch.first_unit;
  const int lane = threadIdx.x % kWarp;
  const auto statistics = statistics_by_warp(forward, branch.units, hidden);
  const auto normalised_at = [&](int64_t j) { return (hidden(j) - statistics.mean) * statistics.inverse_std; };
  const auto norm_weight = [&](int64_t j) { return forward.norm ? branch.norm_weight.at_or(j, A(1)) : A(1); };

  A sum = A(0), dot = A(0);
  for (int64_t j = lane; j < branch.units; j += kWarp) {
    const A normalised = normalised_at(j), z = norm_affine(forward, branch, j, normalised);
    const A grad_z = forward.activation.template backward<kReluOrSilu>(z, grad_activated(j));
    grad_z_of[j] = grad_z;
    if (keeps) {
      params.activated[first + j] = forward.activation.template value<kReluOrSilu>(z);
      params.grad_z[first + j] = grad_z;
      params.grad_norm_weight[first + j] = grad_z * normalised;
    }
    sum += grad_z * norm_weight(j);
    dot += grad_z * norm_weight(j) * normalised;
  }
  sum = warp_sum(sum) / static_cast<A>(branch.units);
  dot = warp_sum(dot) / static_cast<A>(branch.units);
  for (int64_t j = lane; j < branch.units; j += kWarp) {
    A grad = grad_z_of[j] * norm_weight(j);
    if (forward.norm) grad = statistics.inverse_std * (grad - sum - normalised_at(j) * dot);
    if (keeps) params.grad_hidden[first + j] = grad;
    put_grad_hidden(j, grad);
  }
}

// The whole block, a power of two of threads, calls put(column, sum_r matrix[r, column] input_r) for all columns. scratch is
// shared memory, [threads * kMatrixVector].
template <typename T, typename W, int V, typename Put>
__device__ __forceinline__ void transposed_columns(const W* matrix, int64_t rows, int64_t columns, const acc_t<T>* input,
                                                   acc_t<T>* scratch, const Put& put) {
  using A = acc_t<T>;
  const int64_t vectors = columns / V;
  int lanes = 1;
  while (lanes < static_cast<int>(blockDim.x) && lanes < vectors) lanes *= 2;
  const int groups = blockDim.x / lanes, part = threadIdx.x % lanes, group = threadIdx.x / lanes;
  for (int64_t first = 0; first < vectors; first += lanes) {
    const int64_t column = (first + part) * V;
    A sum[V];
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] = A(0);
    if (column < columns) {
      load_ahead<8>(
          group, rows, groups, [&](int64_t r) { return load_vector<V>(matrix + r * columns + column); },
          [&](int64_t r, const Vector<W, V>& values) {
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] += static_cast<A>(values.data[j]) * input[r];
          });
    }
#pragma unroll
    for (int j = 0; j < V; j++) scratch[(group * lanes + part) * V + j] = sum[j];
    __syncthreads();
    for (int i = threadIdx.x; i < lanes * V; i += blockDim.x) {
      A total = A(0);
      for (int g = 0; g < groups; g++) total += scratch[g * lanes * V + i];
      if (first * V + i < columns) put(first * V + i, total);
    }
    __syncthreads();
  }
}

template <typename T, typename Put>
__device__ __forceinline__ void transposed_by_block(const Parameter<T>& matrix, int64_t rows, int64_t columns,
                                                    const acc_t<T>* input, acc_t<T>* scratch, const Put& put) {
  const auto as = [&](const auto* values) {
    using W = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
    if (vector_rows(values, columns)) {
      transposed_columns<T, W, kMatrixVector>(values, rows, columns, input, scratch, put);
    } else {
      transposed_columns<T, W, 1>(values, rows, columns, input, scratch, put);
    }
  };
  with_values(matrix, as);
}

template <typename A>
struct TransformBackwardShared {
  A* grad_t;                        // [branches, channels]
  A* grad_context;                  // [channels]
  A *grad_activated, *grad_hidden;  // [units]
  A* scratch;                       // of transposed_by_block

  __host__ __device__ TransformBackwardShared(auto& memory, int64_t channels, int64_t units) {
    memory.take(grad_t, kBranches * channels);
    memory.take(grad_context, channels);
    memory.take(grad_activated, units);
    memory.take(grad_hidden, units);
    memory.take(scratch, kCudaSweepThreads * kMatrixVector);
  }
};

// One block of kCudaSweepThreads threads computes the backward pass of one sample, with a ReLU or SiLU. Other blocks of the
// launch may have written grad_t.
template <typename T>
__device__ void transform_backward_sample(const TransformGradParams<T>& params, int64_t sample) {
  using A = acc_t<T>;
  const TransformParams<T>& forward = params.forward;
  const int64_t channels = forward.channels;
  const auto shared = shared_memory<TransformBackwardShared<A>>(channels, forward.units);
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    shared.grad_context[c] = A(0);
    for (int b = 0; b < kBranches; b++) {
      if (forward.branch[b].units == 0) continue;
      shared.grad_t[b * channels + c] = load_fresh(params.grad_t[b] + sample * channels + c);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int b = 0; b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (!branch.w2.present()) continue;
    transposed_by_block(branch.w2, channels, branch.units, shared.grad_t + b * channels, shared.scratch,
                        [&](int64_t j, A value) { shared.grad_activated[branch.first_unit + j] = value; });
  }
  for (int b = threadIdx.x / kWarp; b < kBranches; b += blockDim.x / kWarp) {
    const BranchParams<T>& branch = forward.branch[b];
    const A* hidden = forward.hidden + sample * forward.units + branch.first_unit;
    if (branch.w2.present()) {
      activate_backward_by_warp</*kReluOrSilu=*/true>(
          params, sample, branch, [&](int64_t j) { return hidden[j]; },
          [&](int64_t j) { return shared.grad_activated[branch.first_unit + j]; },
          params.grad_z + sample * forward.units + branch.first_unit, /*keeps=*/true,
          [&](int64_t j, A value) { shared.grad_hidden[branch.first_unit + j] = value; });
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int b = 0; b < kBranches; b++) {
    const BranchParams<T>& branch = forward.branch[b];
    if (branch.units == 0) continue;
    const A* grad = branch.w2.present() ? shared.grad_hidden + branch.first_unit : shared.grad_t + b * channels;
    transposed_by_block(branch.w1, branch.units, channels, grad, shared.scratch,
                        [&](int64_t c, A value) { shared.grad_context[c] += value; });
  }
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    params.grad_context[sample * channels + c] = shared.grad_context[c];
  }
}

}  // namespace gcnet_ext::cuda
