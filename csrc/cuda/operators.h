// The operators of csrc/ops.cpp as sequences of launches, on plain pointers. The torch glue (*.cu) and the emulator
// (tests/native) call these.
#pragma once

#include <utility>

#include "attention_pool_launch.h"
#include "channel_fuse_launch.h"
#include "elements_launch.h"
#include "transform_launch.h"

namespace gcnet_ext::cuda {

// ---- attention_pool ---------------------------------------------------------------------------------------------------------

// Without a weight: average pooling, and no attention.
template <typename T>
struct AttentionPool {
  Map<const T> x;
  Extent extent;
  Parameter<T> weight, bias;
  acc_t<T>* context;
  acc_t<T>* attention;
  Valid<T> valid;  // without its shares
};

// The context of all samples; and their transform, where transform.in_tail says so. arrived: a zero for every sample.
template <typename T>
void pool_context(const AttentionPool<T>& call, const TransformParams<T>& transform, unsigned* arrived, Workspace& workspace,
                  cudaStream_t stream) {
  using A = acc_t<T>;
  const Extent& extent = call.extent;
  const Valid<T> valid = with_shares(call.valid, extent, workspace, stream);
  if (!call.weight.data && valid.data) return launch_average_valid(call.x, extent, valid, call.context, stream);
  if (!call.weight.data) {
    SumsParams<T> params;
    params.a = call.x;
    params.extent = extent;
    params.sum_a = MutableParameter<T>(call.context);
    params.factor = A(1) / static_cast<A>(extent.positions);
    params.arrived = arrived;
    params.after = transform.in_tail ? AfterSums::transform : AfterSums::nothing;
    params.transform = transform;
    launch_channel_sums(params, workspace, stream);
    return;
  }
  const CudaPoolPlan plan = pool_plan(common_map<T>(extent, call.x), valid);
  PoolParams<T> params{};
  params.x = call.x;
  params.extent = extent;
  params.weight = call.weight;
  params.bias = call.bias;
  params.context = call.context;
  params.attention = call.attention;
  params.partial = workspace.take<A>(extent.samples * plan.splits * (extent.channels + 2));
  params.arrived = arrived;
  params.transform = transform;
  params.valid = valid;
  launch_attention_pool(params, plan, stream);
}

template <typename T>
void attention_pool(const AttentionPool<T>& call, Workspace& workspace, cudaStream_t stream) {
  unsigned* const arrived = call.weight.data ? workspace.zeros(call.extent.samples, stream) : nullptr;
  pool_context(call, TransformParams<T>{}, arrived, workspace, stream);
}

template <typename T>
struct AttentionPoolBackward {
  Map<const T> x;
  Map<T> grad_x;  // without data: not wanted
  Extent extent;
  Parameter<T> weight;
  const acc_t<T>*grad_context, *context, *attention;
  MutableParameter<T> grad_weight;
  Valid<T> valid;  // without its shares
};

// The gradient of the mask's weight from its parts, [N*splits, C].
template <typename T>
GradientOf<T> mask_gradient(const acc_t<T>* partial, int64_t splits, const Extent& extent,
                            const MutableParameter<T>& gradient) {
  GradientOf<T> of;
  of.left = partial;
  of.terms = extent.samples * splits;
  of.left_stride = of.rows = extent.channels;
  of.gradient = gradient;
  return of;
}

// out = x * scale + shift, with the shift for those positions only that had a part in the average.
template <typename T>
void average_backward(const FuseParams<T>& params, const Valid<T>& valid, cudaStream_t stream) {
  if (valid.data) return launch_fuse_elements(params, {}, /*relu=*/false, valid, stream);
  launch_channel_fuse(params, stream);
}

template <typename T>
void attention_pool_backward(const AttentionPoolBackward<T>& call, Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  const Extent& extent = call.extent;
  const Valid<T> valid = with_shares(call.valid, extent, workspace, stream);
  if (!call.weight.data) {
    FuseParams<T> params;
    params.out = call.grad_x;
    params.extent = extent;
    params.shift = Parameter<T>(call.grad_context);
    if (!valid.data) params.shift_factor = A(1) / static_cast<A>(extent.positions);
    if (call.grad_x.data) average_backward(params, valid, stream);
    return;
  }
  const CudaPoolPlan plan = pool_plan(common_map<T>(extent, call.x, call.grad_x), valid);
  PoolBackwardParams<T> params;
  params.x = call.x;
  params.grad_x = call.grad_x;
  params.extent = extent;
  params.weight = call.weight;
  params.grad_context = call.grad_context;
  params.context = call.context;
  params.attention = call.attention;
  params.valid = valid;
  if (call.grad_weight.data) params.partial = workspace.take<A>(extent.samples * plan.splits * extent.channels);
  if (call.grad_x.data || call.grad_weight.data) launch_attention_pool_backward(params, plan, stream);
  GradientParams<T> gradients;
  if (call.grad_weight.data) gradients.add(mask_gradient(params.partial, plan.splits, extent, call.grad_weight));
  launch_parameter_gradients(gradients, stream);
}

// ---- channel_fuse -----------------------------------------------------------------------------------------------------------

template <typename T>
struct ChannelFuse {
  Map<const T> x;
  Map<T> out;
  Extent extent;
  Parameter<T> scale, shift;
  Map<const T> residual = {};  // may be absent
  bool relu = false;
  uint8_t* positive = nullptr;  // the bits of the ReLU; null: not wanted
};

template <typename T>
void channel_fuse(const ChannelFuse<T>& call, cudaStream_t stream) {
  FuseParams<T> params;
  params.x = call.x;
  params.out = call.out;
  params.extent = call.extent;
  params.scale = call.scale;
  params.shift = call.shift;
  if (call.residual.data || call.relu) {
    launch_fuse_elements(params, call.residual, call.relu, {}, stream);
  } else {
    launch_channel_fuse(params, stream);
  }
  const Map<const T> out{call.out.data, call.out.sample_stride, call.out.channel_stride, call.out.position_stride};
  if (call.positive) launch_positive_bits(out, call.extent, call.positive, stream);
}

// What has no data is not wanted.
template <typename T>
struct ChannelFuseBackward {
  Map<const T> grad, x;
  Map<T> grad_x;
  Extent extent;
  Parameter<T> scale;
  MutableParameter<T> grad_scale, grad_shift;
};

template <typename T>
void channel_fuse_backward(const ChannelFuseBackward<T>& call, Workspace& workspace, cudaStream_t stream) {
  if (!call.grad_scale.data && !call.grad_shift.data) {
    if (call.grad_x.data) channel_fuse<T>({call.grad, call.grad_x, call.extent, call.scale, {}}, stream);
    return;
  }
  SumsParams<T> params;
  params.a = call.grad;
  if (call.grad_scale.data) params.b = call.x;
  params.fused = call.grad_x;
  params.scale = call.scale;
  params.extent = call.extent;
  params.sum_a = call.grad_shift;
  params.sum_ab = call.grad_scale;
  launch_channel_sums(params, workspace, stream);
}

// ---- global_context ---------------------------------------------------------------------------------------------------------

// The weights and options of the transform, and the tensors of the forward pass that the backward pass gets, stand in
// `transform`; units and first_unit of its branches too.
template <typename T>
struct GlobalContext {
  Map<const T> x;
  Map<T> out;
  Extent extent;
  Parameter<T> mask_weight, mask_bias;
  acc_t<T>* context;
  acc_t<T>* attention;
  TransformParams<T> transform;
  Map<const T> residual;  // may be absent
  bool relu;
  uint8_t* positive;  // null: not wanted
  Valid<T> valid;     // without its shares
};

template <typename T>
bool transform_in_tail(const TransformParams<T>& transform) {
  if (!transform.activation.usual()) return false;
  int64_t bytes = 0;
  for (const BranchParams<T>& branch : transform.branch) {
    for (const Parameter<T>* matrix : {&branch.w1, &branch.w2}) {
      if (matrix->data) bytes += branch.units * transform.channels * (matrix->single ? sizeof(float) : sizeof(T));
    }
  }
  return plan_cuda_tail(transform.channels, transform.units, bytes, sizeof(acc_t<T>), tuning());
}

template <typename T>
void global_context(const GlobalContext<T>& call, Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  const Extent& extent = call.extent;
  TransformParams<T> transform = call.transform;
  transform.context = call.context;
  transform.in_tail = transform_in_tail(transform) && (call.mask_weight.data || !call.valid.data);
  transform.samples = extent.samples;
  if (transform.branch[kShift].units) transform.shift = workspace.take<A>(extent.samples * extent.channels);
  const bool clips = transform.hard_sigmoid && transform.branch[kScale].units;
  if (clips) transform.scale = workspace.take<A>(extent.samples * extent.channels);
  const bool merges = call.mask_weight.data || transform.in_tail;
  unsigned* const arrived = merges ? workspace.zeros(extent.samples, stream) : nullptr;
  pool_context<T>({call.x, extent, call.mask_weight, call.mask_bias, call.context, call.attention, call.valid}, transform,
                  arrived, workspace, stream);
  if (!transform.in_tail) launch_transform(transform, stream);
  ChannelFuse<T> fuse{call.x, call.out, extent, {}, {}, call.residual, call.relu, call.positive};
  if (transform.branch[kScale].units) fuse.scale = Parameter<T>(transform.scale_values());
  if (transform.branch[kShift].units) fuse.shift = Parameter<T>(transform.shift);
  channel_fuse(fuse, stream);
}

// The gradients of a branch's parameters; what has no data is not wanted.
template <typename T>
struct BranchGradients {
  MutableParameter<T> w1, b1, norm_weight, norm_bias, w2, b2;
};

template <typename T>
struct GlobalContextBackward {
  Map<const T> grad, x;
  Map<T> grad_x;  // without data: not wanted
  Extent extent;
  Parameter<T> mask_weight;
  const acc_t<T>*context, *attention;
  TransformParams<T> transform;
  MutableParameter<T> grad_mask_weight;
  BranchGradients<T> gradients[kBranches];
  Valid<T> valid;  // without its shares
};

template <typename T>
void add_branch_gradients(const TransformGradParams<T>& params, const BranchGradients<T>& gradients, int b,
                          GradientParams<T>& all) {
  const TransformParams<T>& forward = params.forward;
  const BranchParams<T>& branch = forward.branch[b];
  const auto of_t = [&](GradientOf<T> of) {
    of.left = params.grad_t[b];
    of.left_stride = of.rows = forward.channels;
    return of;
  };
  const auto of_units = [&](const acc_t<T>* values, GradientOf<T> of) {
    of.left = values + branch.first_unit;
    of.left_stride = forward.units;
    of.rows = branch.units;
    return of;
  };
  const auto of_hidden = [&](GradientOf<T> of) { return branch.w2.data ? of_units(params.grad_hidden, of) : of_t(of); };
  const auto times = [](GradientOf<T> of, const acc_t<T>* right, int64_t stride, int64_t columns) {
    of.right = right;
    of.right_stride = stride;
    of.columns = columns;
    return of;
  };
  const auto add = [&](GradientOf<T> of, const MutableParameter<T>& gradient, int64_t terms) {
    of.terms = terms;
    of.gradient = gradient;
    if (gradient.data) all.add(of);
  };
  const int64_t samples = forward.samples, normed = forward.norm ? samples : 0;  // without a norm its parameters do nothing
  add(times(of_hidden({}), forward.context, forward.channels, forward.channels), gradients.w1, samples);
  add(of_hidden({}), gradients.b1, samples);
  add(of_units(params.grad_norm_weight, {}), gradients.norm_weight, normed);
  add(of_units(params.grad_z, {}), gradients.norm_bias, normed);
  add(times(of_t({}), params.activated + branch.first_unit, forward.units, branch.units), gradients.w2, samples);
  add(of_t({}), gradients.b2, samples);
}

template <typename T>
void global_context_backward(const GlobalContextBackward<T>& call, Workspace& workspace, cudaStream_t stream) {
  using A = acc_t<T>;
  const Extent& extent = call.extent;
  const int64_t samples = extent.samples, channels = extent.channels;
  const bool attends = call.mask_weight.data != nullptr, has_scale = call.transform.branch[kScale].units > 0,
             has_shift = call.transform.branch[kShift].units > 0;

  TransformGradParams<T> transform;
  transform.forward = call.transform;
  transform.forward.context = call.context;
  transform.forward.samples = samples;
  transform.forward.in_tail = transform_in_tail(call.transform);
  const int64_t units = call.transform.units;
  const int64_t chunks = batch_chunks(channels);
  const bool clips = has_scale && call.transform.hard_sigmoid;
  A* next = workspace.take<A>(samples * ((1 + has_scale + has_shift + clips) * channels + (4 + chunks) * units));
  const auto take = [&](int64_t width) { return std::exchange(next, next + samples * width); };
  A* const grad_t_scale = has_scale ? take(channels) : nullptr;
  A* const grad_t_shift = has_shift ? take(channels) : nullptr;
  transform.grad_t[kScale] = grad_t_scale;
  transform.grad_t[kShift] = grad_t_shift;
  if (clips) transform.forward.scale = take(channels);
  transform.grad_context = take(channels);
  const Valid<T> valid = with_shares(call.valid, extent, workspace, stream);
  if (!attends && !valid.data) transform.grad_context_factor = A(1) / static_cast<A>(extent.positions);
  transform.activated = take(units);
  transform.grad_hidden = take(units);
  transform.grad_z = take(units);
  transform.grad_norm_weight = take(units);
  transform.grad_activated = take(chunks * units);
  unsigned* const arrived = workspace.zeros(samples + batch_counters(samples), stream);
  transform.arrived = arrived + samples;

  SumsParams<T> sums;
  sums.a = call.grad;
  if (has_scale) sums.b = call.x;
  sums.extent = extent;
  if (has_shift) sums.sum_a = MutableParameter<T>(grad_t_shift);
  if (has_scale) sums.sum_ab = MutableParameter<T>(grad_t_scale);
  sums.through_gate = has_scale;
  sums.arrived = arrived;
  sums.after = transform.forward.in_tail ? AfterSums::transform_backward : AfterSums::nothing;
  sums.transform_grad = transform;
  launch_channel_sums(sums, workspace, stream);
  if (!transform.forward.in_tail) launch_transform_backward(transform, stream);

  GradientParams<T> gradients;
  if (attends && (call.grad_x.data || call.grad_mask_weight.data)) {
    const CudaPoolPlan plan = pool_plan(common_map<T>(extent, call.x, call.grad, call.grad_x), valid);
    PoolBackwardParams<T> pool;
    pool.x = call.x;
    pool.grad = call.grad;
    pool.grad_x = call.grad_x;
    pool.extent = extent;
    pool.weight = call.mask_weight;
    pool.scale = has_scale ? transform.forward.scale_values() : nullptr;
    pool.grad_context = transform.grad_context;
    pool.context = call.context;
    pool.attention = call.attention;
    pool.valid = valid;
    if (call.grad_mask_weight.data) {
      pool.partial = workspace.take<A>(samples * plan.splits * channels);
      gradients.add(mask_gradient(pool.partial, plan.splits, extent, call.grad_mask_weight));
    }
    launch_attention_pool_backward(pool, plan, stream);
  } else if (call.grad_x.data) {
    FuseParams<T> fuse;
    fuse.x = call.grad;
    fuse.out = call.grad_x;
    fuse.extent = extent;
    if (has_scale) fuse.scale = Parameter<T>(transform.forward.scale_values());
    fuse.shift = Parameter<T>(transform.grad_context);
    average_backward(fuse, valid, stream);
  }
  for (int b = 0; b < kBranches; b++) add_branch_gradients(transform, call.gradients[b], b, gradients);
  launch_parameter_gradients(gradients, stream);
}

}  // namespace gcnet_ext::cuda
