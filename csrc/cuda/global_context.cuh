// The Global Context block as a sequence of launches, on plain pointers: the pool, the transform, the fusion, and back. The
// torch glue (global_context.cu) and the kernel tests (tests/native/cuda) call these.
#pragma once

#include <utility>

#include "attention_pool_backward.cuh"
#include "global_context_backward_tickets.cuh"
#include "global_context_tickets.cuh"
#include "transform_batched.cuh"
#include "transform_split_backward.cuh"

namespace gcnet_ext::cuda {

// Whether the last block of a sample computes the transform, or its backward pass.
template <typename T>
bool transform_in_tail(const TransformParams<T>& transform) {
  if (!transform.activation.is_relu_or_silu() || tuning().by_items()) return false;
  int64_t bytes = 0;
  for (const BranchParams<T>& branch : transform.branch) {
    for (const Parameter<T>* matrix : {&branch.w1, &branch.w2}) {
      if (matrix->data) bytes += branch.units * transform.channels * (matrix->is_float32 ? sizeof(float) : sizeof(T));
    }
  }
  return plan_cuda_tail(transform.channels, transform.units, bytes, sizeof(acc_t<T>), tuning());
}

// The caller sets x, the parameters and the results of the pool; the weights and options of pool.transform, its hidden and its
// gate; and out, the residual, the ReLU and its bits of the fusion.
template <typename T>
void global_context(PoolParams<T> pool, Fusion<T> fuse, Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t samples = pool.extent.samples, channels = pool.extent.channels;
  TransformParams<T>& transform = pool.transform;
  transform.context = pool.context;
  transform.samples = samples;
  const bool split = transform_is_split(transform);
  transform.in_tail = !split && transform_in_tail(transform) && (pool.weight.data || !pool.valid.data);
  pool.merged_later = split;
  const bool has_scale = transform.branch[kScale].units > 0, has_shift = transform.branch[kShift].units > 0;
  if (has_shift) transform.shift = workspace.take<A>(samples * channels);
  if (has_scale && transform.hard_sigmoid) transform.scale = workspace.take<A>(samples * channels);
  fuse.x = pool.x;
  fuse.extent = pool.extent;
  if (has_scale) fuse.scale = Parameter<T>(transform.scale_values());
  if (has_shift) fuse.shift = Parameter<T>(transform.shift);
  if (split && tuning().by_tickets() && launch_global_context_tickets(pool, fuse, workspace, stream)) return;

  attention_pool(pool, workspace, stream);
  if (split) {
    launch_transform_split(pool, workspace, stream);
  } else if (!transform.in_tail) {
    launch_transform(transform, stream);
  }

  fuse.early = split;
  channel_fuse(fuse, stream);
}

// The gradients of the block's parameters; an absent one is not computed.
template <typename T>
struct BranchGradients {
  MutableParameter<T> w1, b1, norm_weight, norm_bias, w2, b2;
};
template <typename T>
struct BlockGradients {
  MutableParameter<T> mask_weight, mask_bias;
  BranchGradients<T> branch[kBranches];
};

// The gradients of the parameters of branch b. of_previous_launch: the backward pass of the transform is the launch before them.
template <typename T>
void add_branch_gradients(const TransformGradParams<T>& params, const BranchGradients<T>& gradients, int b,
                          bool of_previous_launch, GradientParams<T>& all) {
  using A = acc_t<T>;
  const TransformParams<T>& forward = params.forward;
  const BranchParams<T>& branch = forward.branch[b];
  const auto of_units = [&](const A* values) { return Terms<A>{values + branch.first_unit, forward.units, branch.units}; };
  const Terms<A> context{forward.context, forward.channels, forward.channels}, activated = of_units(params.activated);
  const Terms<A> grad_t{params.grad_t[b], forward.channels, forward.channels};
  const Terms<A> grad_hidden = branch.w2.data ? of_units(params.grad_hidden) : grad_t;
  const int64_t samples = forward.samples, normed = forward.norm ? samples : 0;  // without a norm its parameters do nothing
  const auto add = [&](const MutableParameter<T>& gradient, int64_t terms, const Terms<A>& left, const Terms<A>& right) {
    if (!gradient.data) return;
    all.add({.left = left, .right = right, .terms = terms, .gradient = gradient, .of_previous_launch = of_previous_launch});
  };
  add(gradients.w1, samples, grad_hidden, context);
  add(gradients.b1, samples, grad_hidden, {});
  add(gradients.norm_weight, normed, of_units(params.grad_norm_weight), {});
  add(gradients.norm_bias, normed, of_units(params.grad_z), {});
  add(gradients.w2, samples, grad_t, activated);
  add(gradients.b2, samples, grad_t, {});
}

// Lets the bits of a final ReLU mask the gradient: in the kernels that read it, or else in a launch before them. Where
// grad_residual is wanted, it gets the masked gradient.
template <typename T>
void mask_gradient(const uint8_t* positive, const Map<T>& grad_residual, bool with_dx, SumsParams<T>& sums,
                   PoolBackwardParams<T>& pool, Workspace& workspace, cudaStream_t stream) {
  const Extent& extent = pool.extent;
  sums.positive = positive;
  sums.fused = grad_residual;
  const bool by_sums = sums_by_items(sums);
  if (by_sums && grad_residual.data) {
    pool.grad = read_only(grad_residual);
    pool.grad_is_new = true;
    return;
  }
  pool.positive = positive;
  if (by_sums && (!with_dx || (pool.weight.data && pool_backward_plan(pool).by_items()))) return;
  Map<T> masked = grad_residual;
  if (!masked.data) {
    const int64_t C = extent.channels, P = extent.positions;
    masked = {workspace.take<T>(extent.elements()), C * P, extent.channels_last ? 1 : P, extent.channels_last ? C : 1};
  }
  launch_relu_backward(pool.grad, masked, extent, positive, stream);
  sums.positive = pool.positive = nullptr;
  sums.fused = {};
  sums.a = pool.grad = read_only(masked);
}

// The caller sets x, grad, grad_x, the weight of the mask, and what the pool saved; the weights, options, hidden and gate of
// the transform's forward pass; and the gradients of the parameters. `positive` has the bits of the final ReLU, and is null if
// there is none; grad_residual may be absent.
template <typename T>
void global_context_backward(PoolBackwardParams<T> pool, const TransformParams<T>& forward, const BlockGradients<T>& gradients,
                             const uint8_t* positive, const Map<T>& grad_residual, Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t samples = pool.extent.samples, channels = pool.extent.channels, units = forward.units;
  const bool has_scale = forward.branch[kScale].units > 0, has_shift = forward.branch[kShift].units > 0;

  TransformGradParams<T> transform;
  transform.forward = forward;
  transform.forward.context = pool.context;
  transform.forward.samples = samples;
  const bool split = transform_is_split(forward);
  transform.forward.in_tail = !split && transform_in_tail(forward);
  const int64_t chunks = split ? 0 : batch_chunks(channels);
  const bool clips = has_scale && forward.hard_sigmoid;
  A* next = workspace.take<A>(samples * ((1 + has_scale + has_shift + clips) * channels + (4 + chunks) * units));
  const auto take = [&](int64_t width) { return std::exchange(next, next + samples * width); };
  A* const grad_t_scale = has_scale ? take(channels) : nullptr;
  A* const grad_t_shift = has_shift ? take(channels) : nullptr;
  transform.grad_t[kScale] = grad_t_scale;
  transform.grad_t[kShift] = grad_t_shift;
  if (clips) transform.forward.scale = take(channels);
  transform.grad_context = take(channels);
  transform.activated = take(units);
  transform.grad_hidden = take(units);
  transform.grad_z = take(units);
  transform.grad_norm_weight = take(units);
  transform.grad_activated = take(chunks * units);
  unsigned* const arrived = split ? nullptr : workspace.zeros(samples + batch_counters(samples), stream);
  transform.arrived = split ? nullptr : arrived + samples;

  SumsParams<T> sums;
  sums.a = pool.grad;
  if (has_scale) sums.b = pool.x;
  sums.extent = pool.extent;
  if (has_shift) sums.sum_a = MutableParameter<T>(grad_t_shift);
  if (has_scale) sums.sum_ab = MutableParameter<T>(grad_t_scale);
  sums.through_gate = has_scale;
  sums.arrived = arrived;
  sums.after = transform.forward.in_tail ? AfterSums::transform_backward : AfterSums::nothing;
  sums.transform_grad = transform;
  sums.next_is_early = split;
  const bool with_dx = pool.grad_x.data || gradients.mask_weight.data;

  GradientParams<T> all;
  // The launch of dx lies between those of the transform and that of the gradients.
  for (int b = 0; b < kBranches; b++) add_branch_gradients(transform, gradients.branch[b], b, !with_dx, all);
  all.add_zero(gradients.mask_bias);
  if (has_scale) pool.scale = transform.forward.scale_values();
  pool.grad_context = transform.grad_context;
  pool.next_is_early = split && (all.count > 0 || gradients.mask_weight.data);
  if (tuning().by_tickets() &&
      launch_backward_tickets(sums, pool, positive, grad_residual, gradients.mask_weight, all, workspace, stream)) {
    return;
  }
  if (positive) mask_gradient(positive, grad_residual, with_dx, sums, pool, workspace, stream);
  launch_channel_sums(sums, workspace, stream);
  if (split) {
    launch_transform_backward_split(transform, workspace, stream);
  } else if (!transform.forward.in_tail) {
    launch_transform_backward(transform, stream);
  }

  pool.early = split;
  attention_pool_backward(pool, gradients.mask_weight, all, workspace, stream);
  launch_parameter_gradients(all, /*early=*/split, stream);
}

}  // namespace gcnet_ext::cuda
