// The backward pass of attention pooling, and of the fusion beside it, from dctx, the gradient of the context. In the whole
// block, g is the gradient of the output and s the scale that x was multiplied with. Without a scale s = 1, and without the
// fusion g = 0.
//
//   u_p = dctx . x_p      dl_p = m_p (u_p - dctx . context)      dx_cp = g_cp s_c + m_p dctx_c + dl_p w_c
//   dw_c = sum_p dl_p (x_cp - context_c)
//
// with the attention m. Over a sample, dl adds up to zero but for its rounding errors, and the context in dw keeps these from
// being multiplied with the part that all x_cp have in common. Splits, tiles and the ways through x are those of
// attention_pool.cuh; all but streamed and flat read g and x once. dx is written once. Each split leaves its part of dw, for
// parameter_gradients.cuh to add up.
//
// The average without a weight has dx_cp = g_cp s_c + dctx_c / P.
#pragma once

#include "attention_pool.cuh"
#include "attention_pool_backward_flat.cuh"
#include "attention_pool_backward_position_items.cuh"
#include "attention_pool_backward_positions.cuh"
#include "attention_pool_backward_row_items.cuh"
#include "attention_pool_backward_rows.cuh"
#include "attention_pool_backward_streamed.cuh"
#include "channel_fuse.cuh"
#include "parameter_gradients.cuh"

namespace gcnet_ext::cuda {

// The plan for the current device, on which not every kernel of the second engine may have the shared memory that it needs.
template <typename T>
CudaPoolPlan pool_backward_plan(const PoolBackwardParams<T>& params) {
  const Extent& extent = params.extent;
  const CudaShape shape = common_shape<T>(extent, params.x, params.grad, params.grad_x);
  if constexpr (!std::is_same_v<T, double>) {
    const CudaPoolPlan plan = plan_cuda_pool_backward(shape, tuning());
    if (plan.path == CudaPoolPath::row_items && backward_row_items_fit<T>(plan, extent.samples)) return plan;
    if (plan.path == CudaPoolPath::position_items && backward_position_items_fit<T>(plan, extent)) return plan;
    const bool flat = is_flat(params.x, extent) && is_flat(params.grad, extent) && is_flat(params.grad_x, extent);
    if (plan.path == CudaPoolPath::flat && flat && flat_pool_backward_fits<T>(extent)) return plan;
  }
  return first_engine_pool_plan(shape, params.valid);
}

// Sets first_sample and splits of the params. position_sums: the u_p of the pieces of the path `flat`.
template <typename T>
void launch_attention_pool_backward(PoolBackwardParams<T> params, const CudaPoolPlan& plan, acc_t<T>* position_sums,
                                    cudaStream_t stream) {
  params.splits = static_cast<unsigned>(plan.splits);
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.path == CudaPoolPath::row_items) return launch_attention_pool_backward_row_items(params, plan, stream);
    if (plan.path == CudaPoolPath::position_items) return launch_attention_pool_backward_position_items(params, plan, stream);
    if (plan.path == CudaPoolPath::flat) return launch_attention_pool_backward_flat(params, position_sums, stream);
    if (plan.path == CudaPoolPath::positions) return launch_attention_pool_backward_positions(params, plan, stream);
    if (plan.path == CudaPoolPath::rows) return launch_attention_pool_backward_rows(params, plan, stream);
  }
  launch_attention_pool_backward_streamed(params, plan, stream);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_attention_pool_backward)

// Leaves the gradient of the weight, unless it is absent, for a later launch of all `gradients`: a sum of the parts of all splits.
template <typename T>
void keep_weight_gradient(PoolBackwardParams<T>& params, const CudaPoolPlan& plan, const MutableParameter<T>& grad_weight,
                          GradientParams<T>& gradients, Workspace& workspace) {
  if (!grad_weight.data) return;
  const int64_t splits = params.extent.samples * plan.splits, channels = params.extent.channels;
  params.partial = workspace.take<acc_t<T>>(splits * channels);
  gradients.add({{params.partial, channels, channels}, {}, splits, grad_weight});
}

// Computes the gradient of x, unless params.grad_x is absent, and leaves the gradient of the weight, unless it is absent, for a
// later launch of all `gradients`. Of the params, this sets partial and the shares of valid. A mask of grad, params.positive,
// is for plans by items alone.
template <typename T>
void attention_pool_backward(PoolBackwardParams<T> params, const MutableParameter<T>& grad_weight, GradientParams<T>& gradients,
                             Workspace& workspace, cudaStream_t stream) {
  if (!params.grad_x.data && !grad_weight.data) return;
  using A = acc_t<T>;
  const Extent& extent = params.extent;
  if (!params.weight.data) {
    params.valid = with_shares(params.valid, extent, workspace, stream);
    FuseParams<T> fuse{params.grad, params.grad_x, extent, Parameter<T>(params.scale), Parameter<T>(params.grad_context)};
    if (!params.valid.data) fuse.shift_factor = A(1) / static_cast<A>(extent.positions);
    return channel_fuse<T>({fuse, /*residual=*/{}, /*relu=*/false, params.valid}, stream);
  }
  const CudaPoolPlan plan = pool_backward_plan(params);
  keep_weight_gradient(params, plan, grad_weight, gradients, workspace);
  A* const position_sums = plan.path == CudaPoolPath::flat ? workspace.take<A>(pool_partials<T>(plan, extent)) : nullptr;
  launch_attention_pool_backward(params, plan, position_sums, stream);
}

}  // namespace gcnet_ext::cuda
