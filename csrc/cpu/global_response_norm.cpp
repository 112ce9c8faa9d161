// global_response_norm on the CPU, and its gradients.
//
//   G_c = sqrt(sum_p x_cp^2)    R_c = G_c / (mean_c G + eps)    out_cp = x_cp (1 + gamma_c R_c) + beta_c
//
// x is read twice: for G, and for out. With A_c = sum_p g_cp x_cp and the divisor D = mean_c G + eps, backward reads g and x
// twice each:
//
//   dgamma_c = sum_n A_c R_c    dbeta_c = sum_np g_cp    dG_c = (gamma_c A_c - mean_k (gamma_k A_k R_k)) / D
//   dx_cp = g_cp (1 + gamma_c R_c) + x_cp dG_c / G_c,    where the last term is 0 if G_c is
#include "channel_fuse.h"

#include <cmath>

namespace gcnet_ext::cpu {
namespace {

// The divisor D of a sample.
template <typename acc>
acc divisor_of(const acc* norms, int64_t channels, acc eps) {
  acc sum = 0;
  for (int64_t c = 0; c < channels; c++) sum += norms[c];
  return sum / channels + eps;
}

std::tuple<Tensor, Tensor> global_response_norm_op(const Tensor& x_in, const Tensor& gamma, const Tensor& beta, double eps) {
  check_global_response_norm("global_response_norm", x_in, gamma, beta);
  const Tensor x = native(x_in), out = empty_like_map(x_in);
  const int64_t samples = x.size(0), channels = x.size(1);
  const Tensor norms = empty(x, {samples, channels}, accumulation_dtype(x));
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto w = to_acc<acc>(gamma), b = to_acc<acc>(beta);
    const MatrixBuffer<acc> scale(samples, channels), shift(samples, channels);
    const Matrix<acc> G = matrix_of<acc>(norms);
    const auto x_map = read_map<scalar_t>(x);
    const auto out_map = write_map<scalar_t>(out, x);
    const MapFusion<scalar_t> fusion{.scale = scale, .shift = shift};
    for_each_group(x_map.layout, sizeof(scalar_t), /*weight_bytes=*/0, [&](int64_t first, int64_t count) {
      const auto of_group = x_map.samples(first, count);
      sum_samples(of_group, of_group, {}, {}, G.row_range(first, count));
      for (int64_t n = first; n < first + count; n++) {
        for (int64_t c = 0; c < channels; c++) G.row(n)[c] = std::sqrt(G.row(n)[c]);
        const acc D = divisor_of(G.row(n), channels, static_cast<acc>(eps));
        for (int64_t c = 0; c < channels; c++) scale.row(n)[c] = 1 + w[c] * (G.row(n)[c] / D);
        std::copy(b.begin(), b.end(), shift.row(n));
      }
      fuse_samples(of_group, fusion.samples(first, count), out_map.samples(first, count));
    });
  });
  return {out, norms};
}

std::tuple<Tensor, Tensor, Tensor> global_response_norm_backward_op(const Tensor& grad_in, const Tensor& x_in,
                                                                    const Tensor& gamma, const Tensor& beta, double eps,
                                                                    const Tensor& norms_in, const std::vector<bool>& needs) {
  check_global_response_norm_backward(grad_in, x_in, gamma, beta, norms_in, needs);
  const Tensor grad = native_like(grad_in, x_in), x = native(x_in), norms = dense(norms_in);
  const bool need_x = needs[0], need_gamma = needs[1], need_beta = needs[2];
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_gamma = gradient_of(need_gamma, gamma, x), grad_beta = gradient_of(need_beta, beta, x);
  const int64_t samples = x.size(0), channels = x.size(1);
  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto w = to_acc<acc>(gamma);
    const Matrix<acc> G = matrix_of<acc>(norms);
    const bool products = need_x || need_gamma;
    const MatrixBuffer<acc> sum_g(samples, channels, need_beta), sum_gx(samples, channels, products);  // sum_gx: A, then A N
    const MatrixBuffer<acc> scale(samples, channels, need_x), factor(samples, channels, need_x);
    const auto g_map = read_map<scalar_t>(grad), x_map = read_map<scalar_t>(x);
    const auto grad_x_map = write_map_if<scalar_t>(need_x, grad_x, grad, x);
    const auto gradient = map_kernels<scalar_t>().response_gradient;
    for_each_group(x_map.layout, 2 * sizeof(scalar_t), /*weight_bytes=*/0, [&](int64_t first, int64_t count) {
      const auto g_of_group = g_map.samples(first, count), x_of_group = x_map.samples(first, count);
      sum_samples(g_of_group, x_of_group, {}, need_beta ? sum_g.row_range(first, count) : Matrix<acc>{},
                  products ? sum_gx.row_range(first, count) : Matrix<acc>{});
      for (int64_t n = first; products && n < first + count; n++) {
        const acc D = divisor_of(G.row(n), channels, static_cast<acc>(eps));
        acc* const A = sum_gx.row(n);
        acc mean = 0;
        for (int64_t c = 0; c < channels; c++) mean += w[c] * A[c] * (G.row(n)[c] / D);
        mean /= channels;
        for (int64_t c = 0; c < channels; c++) {
          const acc N = G.row(n)[c] / D;
          if (need_x) {
            scale.row(n)[c] = 1 + w[c] * N;
            factor.row(n)[c] = G.row(n)[c] == 0 ? 0 : (w[c] * A[c] - mean) / D / G.row(n)[c];
          }
          A[c] *= N;
        }
      }
      if (!need_x) return;
      const auto out_of_group = grad_x_map.samples(first, count);
      const Matrix<acc> scales = scale.row_range(first, count), factors = factor.row_range(first, count);
      const auto gradient_of_block = [&](const SweepItem& item) {
        gradient(block_of(g_of_group, item), block_of(x_of_group, item), channels_of(scales, item), channels_of(factors, item),
                 block_of(out_of_group, item));
      };
      for_each_block(sweep_plan(x_of_group), x_of_group.layout, gradient_of_block, Order::backwards);
    });
    const auto add_samples = [&](const Matrix<acc>& of_samples, const Tensor& gradient_of_parameter) {
      std::vector<acc> total(channels, acc(0));
      for (int64_t n = 0; n < samples; n++) {
        for (int64_t c = 0; c < channels; c++) total[c] += of_samples.row(n)[c];
      }
      from_acc(total.data(), gradient_of_parameter);
    };
    if (need_gamma) add_samples(sum_gx, grad_gamma);
    if (need_beta) add_samples(sum_g, grad_beta);
  });
  return {grad_x, grad_gamma, grad_beta};
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("global_response_norm", TORCH_BOX(&gcnet_ext::cpu::global_response_norm_op));
  m.impl("global_response_norm_backward", TORCH_BOX(&gcnet_ext::cpu::global_response_norm_backward_op));
}
