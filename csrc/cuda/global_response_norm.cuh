// The global response norm, between and behind the sums over the positions (csrc/ops.cpp: global_response_norm):
//
//   G_c = sqrt(sum_p x_cp^2)    R_c = G_c / D, D = mean_c G + eps    out_cp = x_cp (1 + gamma_c R_c) + beta_c
//
// backward, with A_c = sum_p g_cp x_cp:
//
//   dgamma_c = sum_n A_c R_c    dbeta_c = sum_np g_cp    dG_c = (gamma_c A_c - mean_k (gamma_k A_k R_k)) / D
//   dx_cp = g_cp (1 + gamma_c R_c) + x_cp dG_c / G_c,    where the last term is 0 if G_c is
#pragma once

#include "elements.cuh"
#include "parameter.cuh"
#include "reduce.cuh"
#include "shared_memory.cuh"

namespace gcnet_ext::cuda {

constexpr int kResponseThreads = 256;

template <typename T>
struct ResponseParams {
  using A = acc_t<T>;
  Extent extent;
  A eps = 0;
  Parameter<T> gamma, beta;              // [C]
  A* norms = nullptr;                    // [N, C]; response_factors finds the sums of squares here and leaves G
  A *scale = nullptr, *shift = nullptr;  // [N, C]: what x, or in backward g, is multiplied with, and what is added
  int64_t first_sample = 0;              // of this launch
  // backward
  A* products = nullptr;     // [N, C]: A, which is overwritten with A R
  const A* sum_g = nullptr;  // [N, C]
  A* factor = nullptr;       // [N, C], of x
  MutableParameter<T> grad_gamma, grad_beta;
};

// Two sums over the channels, of each warp.
template <typename A>
struct ResponseShared {
  A of_warps[2][kResponseThreads / kWarp];
};

// The sum over the threads of the block, in every thread. Each call of a kernel has a place of its own, which no other one reads.
template <int place, typename A>
__device__ A block_sum(A value) {
  A* const of_warps = shared_memory<ResponseShared<A>>().of_warps[place];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  A sum = A(0);
  for (int warp = 0; warp < kResponseThreads / kWarp; warp++) sum += of_warps[warp];
  return sum;
}

// A block has a sample: G, and what x is multiplied with and what is added.
template <typename T>
__global__ void __launch_bounds__(kResponseThreads) response_factors(ResponseParams<T> params) {
  using A = acc_t<T>;
  const int64_t C = params.extent.channels, start = (params.first_sample + blockIdx.x) * C;
  A sum = A(0);
  for (int64_t c = threadIdx.x; c < C; c += kResponseThreads) {
    const A G = sqrt(params.norms[start + c]);
    params.norms[start + c] = G;
    sum += G;
  }
  const A D = block_sum<0>(sum) / C + params.eps;
  for (int64_t c = threadIdx.x; c < C; c += kResponseThreads) {
    params.scale[start + c] = 1 + params.gamma.at(c) * (params.norms[start + c] / D);
    params.shift[start + c] = params.beta.at(c);
  }
}

// A block has a sample: A N, and what g and x are multiplied with, unless nobody needs that.
template <typename T>
__global__ void __launch_bounds__(kResponseThreads) response_gradient_factors(ResponseParams<T> params) {
  using A = acc_t<T>;
  const int64_t C = params.extent.channels, start = (params.first_sample + blockIdx.x) * C;
  A sum_norms = A(0), sum_products = A(0);
  for (int64_t c = threadIdx.x; c < C; c += kResponseThreads) sum_norms += params.norms[start + c];
  const A D = block_sum<0>(sum_norms) / C + params.eps;
  for (int64_t c = threadIdx.x; c < C; c += kResponseThreads) {  // with N and not G, of which the products could overflow
    sum_products += params.gamma.at(c) * params.products[start + c] * (params.norms[start + c] / D);
  }
  const A mean = block_sum<1>(sum_products) / C;
  for (int64_t c = threadIdx.x; c < C; c += kResponseThreads) {
    const A G = params.norms[start + c], N = G / D, w = params.gamma.at(c), product = params.products[start + c];
    if (params.factor) {
      params.scale[start + c] = 1 + w * N;
      params.factor[start + c] = G == A(0) ? A(0) : (w * product - mean) / D / G;
    }
    params.products[start + c] = product * N;
  }
}

// A thread has a channel: the gradients of its gamma and beta, the samples in their order.
template <typename T>
__global__ void __launch_bounds__(kElementThreads) response_parameter_gradients(ResponseParams<T> params) {
  using A = acc_t<T>;
  const int64_t C = params.extent.channels;
  for_elements(C, [&](int64_t c) {
    A of_gamma = A(0), of_beta = A(0);
    for (int64_t n = 0; n < params.extent.samples; n++) {
      if (params.grad_gamma.wanted()) of_gamma += params.products[n * C + c];
      if (params.grad_beta.wanted()) of_beta += params.sum_g[n * C + c];
    }
    if (params.grad_gamma.wanted()) params.grad_gamma.put(c, of_gamma);
    if (params.grad_beta.wanted()) params.grad_beta.put(c, of_beta);
  });
}

// A thread has V neighbours of a row at a time.
template <typename T, int V>
__global__ void __launch_bounds__(kElementThreads)
    response_gradient(Map<const T> grad, Map<const T> x, Map<T> grad_x, Extent extent, const acc_t<T>* scale,
                      const acc_t<T>* factor) {
  using A = acc_t<T>;
  const RowsOfSample rows(extent);
  for_elements(extent.samples * rows.rows * rows.length / V, [&](int64_t i) {
    const Place at(rows, i * V);
    const Vector<T, V> g = load_vector<V>(at.in(grad)), values = load_vector<V>(at.in(x));
    const int64_t first = at.sample * extent.channels + at.channel;
    Vector<T, V> out;
#pragma unroll
    for (int j = 0; j < V; j++) {
      const int64_t channel = rows.channels_last ? first + j : first;
      const A of_x = widen(values.data[j]) * factor[channel];
      out.data[j] = static_cast<T>(multiply_add(widen(g.data[j]), scale[channel], of_x));
    }
    store_vector(at.in(grad_x), out);
  });
}

template <typename T>
void launch_of_samples(void (*kernel)(ResponseParams<T>), const ResponseParams<T>& params, cudaStream_t stream) {
  for_sample_ranges(params, /*blocks_per_sample=*/1, [&](const ResponseParams<T>& range, dim3 blocks) {
    launch(kernel, blocks, dim3(kResponseThreads), shared_bytes<ResponseShared<acc_t<T>>>(), stream, range);
  });
}

// norms: sums of squares -> G; scale and shift.
template <typename T>
void launch_response_factors(const ResponseParams<T>& params, cudaStream_t stream) {
  launch_of_samples(response_factors<T>, params, stream);
}

// From A and sum_g: scale and factor, and the gradients of the parameters.
template <typename T>
void launch_response_gradient_factors(const ResponseParams<T>& params, cudaStream_t stream) {
  if (params.products) launch_of_samples(response_gradient_factors<T>, params, stream);
  if (params.grad_gamma.data || params.grad_beta.data) {
    launch_elements(response_parameter_gradients<T>, params.extent.channels, stream, params);
  }
}

// dx = g * scale + x * factor; the maps lie alike.
template <typename T>
void launch_response_gradient(const Map<const T>& grad, const Map<const T>& x, const Map<T>& grad_x, const Extent& extent,
                              const acc_t<T>* scale, const acc_t<T>* factor, cudaStream_t stream) {
  constexpr int V = kWidest<T>;
  const RowsOfSample rows(extent);
  const bool wide = rows.length % V == 0 && cuda_vector(common_shape<T>(extent, grad, x, grad_x)) == V;
  const int64_t accesses = extent.elements() / (wide ? V : 1);
  launch_elements(wide ? response_gradient<T, V> : response_gradient<T, 1>, accesses, stream, grad, x, grad_x, extent, scale,
                  factor);
}

}  // namespace gcnet_ext::cuda
