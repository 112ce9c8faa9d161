// The innermost loops of the CPU kernels: serial functions over one block of memory, without torch and without threads.
// Each is compiled once per CPU capability from the same source (csrc/cpu/kernels/), and chosen at run time.
#pragma once

#include <cstdint>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <type_traits>

#include "../activation.h"

namespace gcnet_ext::cpu {

using c10::BFloat16;
using c10::Half;

// Sums over scalar_t are taken in this type.
template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// The most positions of a block that attention_pool and attention_pool_backward take: they have an array of so many numbers on
// the stack, which is 8 MiB as a rule and 2 MiB in some threads.
constexpr int64_t kMaxTile = 4096;
static_assert(kMaxTile * sizeof(double) <= 64 << 10);

// A block of a feature map: some channels of some positions of one sample.
template <typename scalar_t>
struct Block {
  scalar_t* data;
  int64_t channels, positions;
  int64_t channel_stride, position_stride;  // one of them is 1
  bool channels_last;                       // channel_stride is 1
  bool past_caches = false;                 // written past the caches: nobody reads it soon
};

// A running softmax-weighted sum: sum_p exp(logit_p - max) x_p and sum_p exp(logit_p - max) over the positions seen so far.
template <typename acc>
struct SoftmaxSum {
  acc max, sum;
  acc* weighted;  // [C]
};

// What the second backward pass needs of one sample besides x and g.
template <typename acc>
struct PoolGradient {
  const acc* grad_context;  // dctx [C]
  acc context_dot;          // dctx . ctx
  const acc* weight;        // w [C]
  const acc* scale;         // [C], what g is multiplied with; null for 1
};

// Bits of a block, one for each element: those of a row begin with a byte, `stride` bytes behind those of the row before. Rows are
// channels, or positions in channels_last.
template <typename byte_t>
struct Bits {
  byte_t* data = nullptr;
  int64_t stride = 0;
};

// What becomes of x in the fusion.
template <typename scalar_t>
struct Fusion {
  const acc_t<scalar_t>* scale;  // [C]; null for 1
  const acc_t<scalar_t>* shift;  // [C]; null for -0, which changes no number
  Block<const scalar_t> residual{};
  bool relu = false;
  Bits<uint8_t> positive{};  // where the ReLU lets pass; not written without data
};

// Loops over a feature map of scalar_t.
template <typename scalar_t>
struct MapKernels {
  using acc = acc_t<scalar_t>;
  // logit_p = w . x_p + b, written to logits; the block is added to the running softmax-weighted sum.
  void (*attention_pool)(Block<const scalar_t> x, const acc* weight, acc bias, acc* logits, SoftmaxSum<acc>& state);
  // u_p = dctx . x_p, dl_p = m_p (u_p - dctx . ctx); dx = g*scale + m_p dctx + dl_p w (g or dx may have null data);
  // grad_weight += sum_p dl_p x_p (unless null). Returns sum_p dl_p.
  acc (*attention_pool_backward)(Block<const scalar_t> grad, Block<const scalar_t> x, const acc* attention,
                                 const PoolGradient<acc>& sample, Block<scalar_t> grad_x, acc* grad_weight);
  // The steps of the two above, for a block that has some of the channels of all positions.
  // dots[p] = sum_c w_c x_cp
  void (*position_dots)(Block<const scalar_t> x, const acc* w, acc* dots);
  // sums[c] += sum_p a_p x_cp
  void (*channel_dots)(Block<const scalar_t> x, const acc* a, acc* sums);
  // dx = g*scale + m_p dctx + dl_p w, grad_weight += sum_p dl_p x_p; grad, dx and grad_weight may be null.
  void (*pool_gradient)(Block<const scalar_t> grad, Block<const scalar_t> x, const acc* attention, const acc* dl,
                        const PoolGradient<acc>& sample, Block<scalar_t> grad_x, acc* grad_weight);
  // out = relu(x*scale + shift + residual), each of it if wanted; x bit for bit if nothing is.
  void (*channel_fuse)(Block<const scalar_t> x, const Fusion<scalar_t>& fusion, Block<scalar_t> out);
  // masked = grad where the bit of `positive` is 1, and 0 elsewhere; masked may be grad.
  void (*relu_backward)(Block<const scalar_t> grad, Bits<const uint8_t> positive, Block<scalar_t> masked);
  // sum_a[c] += sum_p a_cp; sum_ab[c] += sum_p a_cp b_cp (b may have null data; a null sum is not taken).
  void (*channel_sums)(Block<const scalar_t> a, Block<const scalar_t> b, acc* sum_a, acc* sum_ab);
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

// A view of a matrix whose rows lie `stride` elements apart.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;

  T* row(int64_t i) const { return data + i * stride; }
  Matrix some_rows(int64_t begin, int64_t end) const { return {row(begin), end - begin, columns, stride}; }
  Matrix some_columns(int64_t begin, int64_t end) const { return {data + begin, rows, end - begin, stride}; }
  operator Matrix<const T>() const { return {data, rows, columns, stride}; }
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
struct Kernels {
  MapKernels<double> map_double;
  MapKernels<float> map_float;
  MapKernels<Half> map_half;
  MapKernels<BFloat16> map_bfloat16;
  VectorKernels<double> vector_double;
  VectorKernels<float> vector_float;
  MatrixKernels<double, double> matrix_double_double;
  MatrixKernels<float, float> matrix_float_float;
  MatrixKernels<float, Half> matrix_float_half;
  MatrixKernels<float, BFloat16> matrix_float_bfloat16;
};

// Those of one capability; csrc/cpu/kernels_<capability>.cpp. Null where the compiler cannot target it.
const Kernels* kernels_default();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

// Those of the capability in use, picked at the first call.
const Kernels& kernels();

template <typename scalar_t>
const MapKernels<scalar_t>& map_kernels() {
  if constexpr (std::is_same_v<scalar_t, double>) return kernels().map_double;
  if constexpr (std::is_same_v<scalar_t, float>) return kernels().map_float;
  if constexpr (std::is_same_v<scalar_t, Half>) return kernels().map_half;
  if constexpr (std::is_same_v<scalar_t, BFloat16>) return kernels().map_bfloat16;
}

template <typename acc>
const VectorKernels<acc>& vector_kernels() {
  if constexpr (std::is_same_v<acc, double>) return kernels().vector_double;
  if constexpr (std::is_same_v<acc, float>) return kernels().vector_float;
}

template <typename acc, typename weight_t>
const MatrixKernels<acc, weight_t>& matrix_kernels() {
  if constexpr (std::is_same_v<weight_t, double>) return kernels().matrix_double_double;
  if constexpr (std::is_same_v<weight_t, float>) return kernels().matrix_float_float;
  if constexpr (std::is_same_v<weight_t, Half>) return kernels().matrix_float_half;
  if constexpr (std::is_same_v<weight_t, BFloat16>) return kernels().matrix_float_bfloat16;
}

}  // namespace gcnet_ext::cpu
