// Attention pooling of a feature map x [N, C, P]:
//
//   logit_p = w . x_p + b      m = softmax_p(logit)      context_c = sum_p m_p x_cp
//
// The positions of a sample are cut into tiles, which are dealt to the splits in turn, so that blocks that run together read
// neighbouring memory. A block goes through the tiles of a split with a running softmax:
//
//   weighted_c = sum_p exp(logit_p - maximum) x_cp      of the tiles so far
//
// is multiplied with exp(old - new maximum) when a tile raises the maximum. Then the splits are merged in their order, and the
// logits become the attention m.
//
// There are six ways through x (CudaPoolPath). With rows, positions and streamed a block has one split, and the last block of a
// sample to finish merges the splits; where the weights of the transform are small, it computes that, too. With row_items and
// position_items a block takes many splits one after another, and a later launch merges them. flat has no splits.
//
// Without a weight the pool averages: context_c = sum_p x_cp / P.
#pragma once

#include "attention_pool_flat.cuh"
#include "attention_pool_merge.cuh"
#include "attention_pool_position_items.cuh"
#include "attention_pool_positions.cuh"
#include "attention_pool_row_items.cuh"
#include "attention_pool_rows.cuh"
#include "attention_pool_streamed.cuh"
#include "channel_sums.cuh"

namespace gcnet_ext::cuda {

// The plan of the first engine, whose path is `streamed` where not all positions count.
template <typename T>
CudaPoolPlan first_engine_pool_plan(const CudaShape& shape, const Valid<T>& valid) {
  CudaTuning decided = tuning();
  decided.engine = 1;
  if (valid.data) decided.streamed = 1;
  return plan_cuda_pool(shape, decided);
}

// The plan for the current device, on which not every kernel of the second engine may have the shared memory that it needs.
template <typename T>
CudaPoolPlan pool_plan(const Extent& extent, const Map<const T>& x, const Valid<T>& valid) {
  const CudaShape shape = common_shape<T>(extent, x);
  if constexpr (!std::is_same_v<T, double>) {
    const CudaPoolPlan plan = plan_cuda_pool(shape, tuning());
    if (plan.path == CudaPoolPath::row_items && row_items_fit<T>(plan, extent.samples)) return plan;
    if (plan.path == CudaPoolPath::position_items && position_items_fit<T>(plan, extent)) return plan;
    if (plan.path == CudaPoolPath::flat && is_flat(x, extent) && flat_pool_fits<T>(extent)) return plan;
  }
  return first_engine_pool_plan(shape, valid);
}

// Sets first_sample and splits of the params.
template <typename T>
void launch_attention_pool(PoolParams<T> params, const CudaPoolPlan& plan, cudaStream_t stream) {
  params.splits = static_cast<unsigned>(plan.splits);
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.path == CudaPoolPath::positions) return launch_attention_pool_positions(params, plan, stream);
    if (plan.path == CudaPoolPath::rows) return launch_attention_pool_rows(params, plan, stream);
    if (plan.path == CudaPoolPath::row_items) return launch_attention_pool_row_items(params, plan, stream);
    if (plan.path == CudaPoolPath::position_items) return launch_attention_pool_position_items(params, plan, stream);
    if (plan.path == CudaPoolPath::flat) return launch_attention_pool_flat(params, stream);
  }
  launch_attention_pool_streamed(params, plan, stream);
}
GCNET_EXT_COMPILED_ELSEWHERE(launch_attention_pool)

// The partial results that the launches of a plan leave for those after them.
template <typename T>
int64_t pool_partials(const CudaPoolPlan& plan, const Extent& extent) {
  if (plan.path != CudaPoolPath::flat) return extent.samples * plan.splits * (extent.channels + 2);
  return extent.samples * plan_cuda_flat_cut(extent.channels, extent.positions, sizeof(T)).pieces * extent.positions;
}

// Computes the context of all samples; also the attention, if there is a weight, and the transform, if it is in the tail. Of
// the params, this sets splits, partial, arrived and the shares of valid.
template <typename T>
void attention_pool(PoolParams<T>& params, Workspace& workspace, cudaStream_t stream) {
  const Extent& extent = params.extent;
  params.valid = with_shares(params.valid, extent, workspace, stream);
  if (params.weight.data) {
    const CudaPoolPlan plan = pool_plan(extent, params.x, params.valid);
    const bool flat = plan.path == CudaPoolPath::flat;
    params.partial = workspace.take<acc_t<T>>(pool_partials<T>(plan, extent));
    params.splits = static_cast<unsigned>(plan.splits);
    if (!params.merged_later && !plan.by_items() && !flat) params.arrived = workspace.zeros(extent.samples, stream);
    launch_attention_pool(params, plan, stream);
    if (flat) params.partial = nullptr;  // the context is there
    if (!params.merged_later && plan.by_items()) launch_attention_pool_merge(params, stream);
    return;
  }
  SumsParams<T> sums;
  sums.a = params.x;
  sums.extent = extent;
  sums.sum_a = MutableParameter<T>(params.context);
  if (!params.valid.data) sums.factor = acc_t<T>(1) / static_cast<acc_t<T>>(extent.positions);
  sums.valid = params.valid;
  if (params.transform.in_tail) sums.after = AfterSums::transform;
  sums.transform = params.transform;
  const bool by_items = sums_by_items(sums);
  if (params.valid.data && !by_items) return launch_average_valid(params.x, extent, params.valid, params.context, stream);
  sums.next_is_early = by_items && params.merged_later;
  launch_channel_sums(sums, workspace, stream);
}

}  // namespace gcnet_ext::cuda
