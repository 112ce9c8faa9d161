// Every kernel of the CPU, declared and listed: serial functions over one block of memory, which know neither torch nor
// threads. Each is compiled once for every capability of processors (kernels_<capability>.cpp); one is picked at run time.
#pragma once

#include <tuple>

#include "types.h"

namespace gcnet_ext::cpu {

// Loops over a feature map of scalar_t.
template <typename scalar_t>
struct MapKernels {
  using acc = acc_t<scalar_t>;
  // logit_p = w . x_p + b, written to logits; the block is added to the running softmax-weighted sum.
  void (*attention_pool)(Block<const scalar_t> x, const acc* weight, acc bias, acc* logits, SoftmaxSum<acc>& state);
  // u_p = dctx . x_p, dl_p = m_p (u_p - dctx . ctx); dx = g*scale + m_p dctx + dl_p w (g or dx may have null data);
  // grad_weight += sum_p dl_p x_p (unless null). Returns sum_p dl_p.
  acc (*attention_pool_backward)(Block<const scalar_t> grad, Block<const scalar_t> x, const acc* attention,
                                 const PoolBackwardSample<acc>& sample, Block<scalar_t> grad_x, acc* grad_weight);
  // The next three are the steps of the pool for a block that has all positions, and not all channels.
  // dots[p] = sum_c w_c x_cp
  void (*position_dots)(Block<const scalar_t> x, const acc* w, acc* dots);
  // sums[c] += sum_p a_p x_cp
  void (*channel_dots)(Block<const scalar_t> x, const acc* a, acc* sums);
  // dx = g*scale + m_p dctx + dl_p w, grad_weight += sum_p dl_p x_p; grad, dx and grad_weight may be null.
  void (*pool_gradient)(Block<const scalar_t> grad, Block<const scalar_t> x, const acc* attention, const acc* dl,
                        const PoolBackwardSample<acc>& sample, Block<scalar_t> grad_x, acc* grad_weight);
  // out = relu(x*scale + shift + residual), with the steps that the fusion has; with none of them out is x bit for bit.
  void (*channel_fuse)(Block<const scalar_t> x, const BlockFusion<scalar_t>& fusion, Block<scalar_t> out);
  // masked = grad where the bit of `positive` is 1, and 0 elsewhere; masked may be grad.
  void (*relu_backward)(Block<const scalar_t> grad, Bits<const uint8_t> positive, Block<scalar_t> masked);
  // sum_a[c] += sum_p a_cp; sum_ab[c] += sum_p a_cp b_cp (b may have null data; a sum that is null is not computed).
  void (*channel_sums)(Block<const scalar_t> a, Block<const scalar_t> b, acc* sum_a, acc* sum_ab);
  // dx = g*scale + x*factor
  void (*response_gradient)(Block<const scalar_t> grad, Block<const scalar_t> x, const acc* scale, const acc* factor,
                            Block<scalar_t> grad_x);
};

// Loops over [N, C] buffers of acc.
template <typename acc>
struct VectorKernels {
  // logits -> exp(logit - max) / sum, in place.
  void (*softmax)(acc* logits, int64_t count, acc max, acc sum);
  // The softmax of sum_i parts[i] + bias; parts [parts_count, count].
  void (*softmax_of_sum)(const acc* parts, int64_t parts_count, int64_t count, acc bias, acc* attention);
  // dl_p = m_p (sum_i parts[i, p] - dctx . ctx), the gradient of the logits; the parts are `stride` apart. Returns sum_p dl_p.
  acc (*logit_gradient)(const acc* parts, int64_t parts_count, int64_t stride, int64_t count, const acc* attention,
                        acc context_dot, acc* dl);
  // dctx . ctx, added in the order in which attention_pool_backward of that layout adds dctx . x_p.
  acc (*context_dot)(const acc* grad_context, const acc* context, int64_t channels, bool channels_last);
  // Mean and (biased) variance.
  void (*moments)(const acc* values, int64_t count, acc* mean, acc* variance);
  // t -> sigmoid(t), in place.
  void (*sigmoid)(acc* t, int64_t count);
  // z -> act(z), in place; the slope is that of leaky_relu.
  void (*activation)(Activation activation, acc slope, acc* z, int64_t count);
  // grad -> grad * act'(z), in place.
  void (*activation_gradient)(Activation activation, acc slope, const acc* z, int64_t count, acc* grad);
};

// Products of x [N, K] and y [N, M] of acc with a matrix W [M, K] of weight_t, whose rows follow one another.
template <typename acc, typename weight_t>
struct MatrixKernels {
  // y[n, m] = bias[m] + sum_k W[m, k] x[n, k]; a null bias is 0.
  void (*linear)(Matrix<const acc> x, Matrix<const weight_t> weight, const acc* bias, Matrix<acc> y);
  // grad_x[n, k] = sum_m grad_y[n, m] W[m, k]
  void (*linear_backward_input)(Matrix<const acc> grad_y, Matrix<const weight_t> weight, Matrix<acc> grad_x);
  // grad_W[m, k] = sum_n grad_y[n, m] x[n, k]
  void (*linear_backward_weight)(Matrix<const acc> grad_y, Matrix<const acc> x, Matrix<weight_t> grad_weight);
};

// Everything that is compiled for one capability.
using Kernels = std::tuple<MapKernels<double>, MapKernels<float>, MapKernels<Half>, MapKernels<BFloat16>, VectorKernels<double>,
                           VectorKernels<float>, MatrixKernels<double, double>, MatrixKernels<float, float>,
                           MatrixKernels<float, Half>, MatrixKernels<float, BFloat16>>;

// The kernels of each capability, from csrc/cpu/kernels_<capability>.cpp. All but the first exist on x86-64 alone.
const Kernels& kernels_default();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();

// The kernels of the capability in use, which is picked at the first call.
const Kernels& kernels();

template <typename scalar_t>
const auto& map_kernels() {
  return std::get<MapKernels<scalar_t>>(kernels());
}
template <typename acc>
const auto& vector_kernels() {
  return std::get<VectorKernels<acc>>(kernels());
}
template <typename acc, typename weight_t>
const auto& matrix_kernels() {
  return std::get<MatrixKernels<acc, weight_t>>(kernels());
}

}  // namespace gcnet_ext::cpu

// The list is compiled once for each capability.
#if defined(GCNET_CAPABILITY)

#include "activation.h"
#include "attention_pool.h"
#include "channel_fuse.h"
#include "global_response_norm.h"
#include "transform.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

template <typename scalar_t>
constexpr MapKernels<scalar_t> kMap{
    .attention_pool = attention_pool<scalar_t>,
    .attention_pool_backward = attention_pool_backward<scalar_t>,
    .position_dots = position_dots<scalar_t>,
    .channel_dots = channel_dots<scalar_t>,
    .pool_gradient = pool_gradient<scalar_t>,
    .channel_fuse = channel_fuse<scalar_t>,
    .relu_backward = relu_backward<scalar_t>,
    .channel_sums = channel_sums<scalar_t>,
    .response_gradient = response_gradient<scalar_t>,
};
template <typename acc>
constexpr VectorKernels<acc> kVector{
    .softmax = softmax<acc>,
    .softmax_of_sum = softmax_of_sum<acc>,
    .logit_gradient = logit_gradient<acc>,
    .context_dot = context_dot<acc>,
    .moments = moments<acc>,
    .sigmoid = sigmoid<acc>,
    .activation = activation<acc>,
    .activation_gradient = activation_gradient<acc>,
};
template <typename acc, typename weight_t>
constexpr MatrixKernels<acc, weight_t> kMatrix{
    .linear = linear<acc, weight_t>,
    .linear_backward_input = linear_backward_input<acc, weight_t>,
    .linear_backward_weight = linear_backward_weight<acc, weight_t>,
};
// (This is a template so that a file that takes only some of the kernels does not compile the others.)
template <typename...>
constexpr Kernels kAll{kMap<double>,
                       kMap<float>,
                       kMap<Half>,
                       kMap<BFloat16>,
                       kVector<double>,
                       kVector<float>,
                       kMatrix<double, double>,
                       kMatrix<float, float>,
                       kMatrix<float, Half>,
                       kMatrix<float, BFloat16>};

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY

#endif
