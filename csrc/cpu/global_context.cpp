// global_context on the CPU: the whole block, one call per direction.
//
//   forward    ctx = attention pool of x;  t = transform(ctx) per branch;  out = act(x*gate(t_scale) + t_shift + residual)
//   backward   g through act;  dt_shift = sum_p g, ds = sum_p g*x;  dctx through the branches;  dx = g*gate + the pool's gradient
//
// g is the gradient of the output, ds that of the scale gate(t_scale), dctx that of the context (docs/backward.md).
// The samples are worked on in groups that stay in the caches between the steps, so that x comes from memory once.
#include "attention_pool.h"
#include "input_norm.h"
#include "transform.h"

namespace gcnet_ext::cpu {
namespace {

template <typename acc>
std::optional<BranchPass<acc>> pass_of(const Branch& branch, const Options& options, const Tensor& x) {
  if (!branch) return std::nullopt;
  return BranchPass<acc>(branch, options, x.size(1));
}

template <typename acc>
int64_t weight_bytes(const std::optional<BranchPass<acc>>& scale, const std::optional<BranchPass<acc>>& shift) {
  return (scale ? scale->weight_bytes() : 0) + (shift ? shift->weight_bytes() : 0);
}

// x and out are native; out may be x. Where `saved` is null, nothing is kept for backward. Where it is given, x has no norm.
void forward_into(const Tensor& x, Arguments& call, const Tensor& out, const Saved* saved) {
  const int64_t samples = x.size(0), channels = x.size(1), attended = call.mask.weight ? positions(x) : 0;
  const int64_t scale_units = call.scale.units(), shift_units = call.shift.units();
  const bool clips = call.scale && call.options.hard_gate;
  const OptionalTensor residual = residual_of(call.residual, x, /*in_place=*/out.data_ptr() == x.data_ptr());
  const OptionalTensor valid = dense(call.valid);

  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    auto weight = to_acc<acc>(call.mask.weight);
    const auto bias = to_acc<acc>(call.mask.bias);
    const InputNorm<acc> norm(call.x_scale, call.x_shift);
    norm.apply_to_weight(weight);
    const auto scale = pass_of<acc>(call.scale, call.options, x), shift = pass_of<acc>(call.shift, call.options, x);
    // The tensors are released as soon as they are read: that is several times slower once x has evicted them from the caches.
    call.mask = {}, call.scale = {}, call.shift = {}, call.x_scale = {}, call.x_shift = {};
    const auto map = read_map<scalar_t>(x);
    const PoolMask<acc> mask{pointer(weight), bias.empty() ? acc(0) : bias[0]};
    const Valid counted(valid, positions(x));

    // What the backward pass needs is kept in tensors, or else in one piece of memory.
    const int64_t gates = scale ? channels : 0, units = scale_units + shift_units;
    const auto memory = saved ? nullptr : buffer<acc>(samples * (channels + gates + attended + units));
    acc* next = memory.get();
    const auto kept = [&](const Tensor Saved::* tensor, int64_t columns) {
      if (saved) return matrix_of<acc>(saved->*tensor);
      return Matrix<acc>{std::exchange(next, next + samples * columns), samples, columns, columns};
    };
    const Matrix<acc> context = kept(&Saved::context, channels), gate = kept(&Saved::gate_values, gates);
    const Matrix<acc> attention = kept(&Saved::attention, attended), hidden = kept(&Saved::hidden, units);
    const bool apart = clips || (norm && !scale);  // whether x is multiplied with other values than those of `gate`
    const MatrixBuffer<acc> multipliers(samples, channels, apart), t_shift(samples, channels, shift.has_value() || norm);
    const Matrix<acc> factors = apart ? Matrix<acc>(multipliers) : scale ? gate : Matrix<acc>{};
    const MapFusion<scalar_t> fusion{.scale = factors,
                                     .shift = t_shift,
                                     .residual = read_map<scalar_t>(residual),
                                     .relu = call.options.has_final_relu(),
                                     .positive = saved ? bits_of<uint8_t>(saved->positive, map.layout) : BitMap<uint8_t>{}};
    const auto out_map = write_map<scalar_t>(out, x);
    for_each_group(map.layout, sizeof(scalar_t), weight_bytes(scale, shift), [&](int64_t first, int64_t count) {
      const auto rows = [&](const Matrix<acc>& matrix) { return matrix.row_range(first, count); };
      const Map<const scalar_t> x_part = map.samples(first, count);
      const Matrix<acc> ctx = rows(context), h = rows(hidden);
      pool_samples(x_part, mask, counted.samples(first), ctx, rows(attention));
      norm.apply_to_context(counted.samples(first), ctx);
      const auto branch = [&](int64_t i) {
        if (i == 0) {
          scale->forward(ctx, /*gated=*/true, h.column_range(0, scale_units), rows(gate));
        } else {
          shift->forward(ctx, /*gated=*/false, h.column_range(scale_units, shift_units), rows(t_shift));
        }
      };
      if (scale && shift && count == 1 && !scale->row_parallel() && !shift->row_parallel()) {  // each is one thread's work
        parallel_for(2, 2 * channels * units, branch);
      } else {
        if (scale) branch(0);
        if (shift) branch(1);
      }
      if (clips) clip_gate<acc>(rows(gate), rows(factors));
      norm.apply_to_fusion(scale.has_value(), rows(factors), shift.has_value(), rows(t_shift));
      fuse_samples(x_part, fusion.samples(first, count), out_map.samples(first, count));
    });
  });
}

ForwardResults global_context_op(Arguments& call) {
  const Tensor& x = call.x;
  const int64_t samples = x.size(0), channels = x.size(1);
  const ScalarType dtype = accumulation_dtype(x);
  const Tensor out = empty_like_map(x);
  const Saved saved{empty(x, {samples, channels}, dtype), empty(x, {samples, call.mask.weight ? positions(x) : 0}, dtype),
                    empty(x, {samples, call.units()}, dtype), empty(x, {samples, call.scale ? channels : 0}, dtype),
                    empty_bits(x, call.options.has_final_relu())};
  forward_into(native(x), call, out, &saved);
  return {out, saved.context, saved.attention, saved.hidden, saved.gate_values, saved.positive};
}

Tensor global_context_inference_op(Arguments& call) {
  const Tensor out = empty_like_map(call.x);
  forward_into(native(call.x), call, out, nullptr);
  return out;
}

void global_context_inplace_op(Arguments& call) {
  check::in_place(kGlobalContextInPlace, call.x, call.residual);
  const Tensor map = native(call.x);
  forward_into(map, call, map, nullptr);
  write_back(map, call.x);
}

BackwardResults global_context_backward_op(const BackwardArguments& call) {
  const Arguments& forward = call.forward;
  const Saved& saved = call.saved;
  const Needs& needs = call.needs;
  const Options& options = forward.options;
  const int64_t samples = forward.x.size(0), channels = forward.x.size(1);
  const int64_t scale_units = forward.scale.units(), shift_units = forward.shift.units();
  const Tensor grad = native_like(call.grad, forward.x), x = native(forward.x);
  const Tensor saved_context = dense(saved.context), saved_attention = dense(saved.attention);
  const Tensor saved_hidden = dense(saved.hidden), saved_gate = dense(saved.gate_values), positive = dense(saved.positive);
  const OptionalTensor valid = dense(forward.valid);
  const BackwardTensors gradients = gradients_of(call);
  write_zero_gradient(gradients.mask_bias);
  const bool relu = options.has_final_relu(), need_weight = needs.mask_weight && forward.mask.weight;
  const Tensor through = relu ? masked_gradient(forward.x, gradients.residual, gradients.x) : grad;

  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto weight = to_acc<acc>(forward.mask.weight);
    const auto scale = pass_of<acc>(forward.scale, options, x), shift = pass_of<acc>(forward.shift, options, x);
    const auto x_map = read_map<scalar_t>(x), g_map = read_map<scalar_t>(through);
    const auto before_relu = relu ? ReluBackward<scalar_t>(grad, positive, through) : ReluBackward<scalar_t>();
    const auto grad_x_map = write_map_if<scalar_t>(needs.x, gradients.x, through, x);
    const auto context = matrix_of<const acc>(saved_context), hidden = matrix_of<const acc>(saved_hidden);
    const auto gate = matrix_of<const acc>(saved_gate);

    const PoolPlan plan = pool_plan(x_map);
    const auto parts = grad_weight_parts<acc>(plan, x_map.layout, need_weight);
    const MatrixBuffer<acc> grad_t_scale(samples, channels, scale.has_value()),
        grad_t_shift(samples, channels, shift.has_value());
    MatrixBuffer<acc> grad_context(samples, channels);
    grad_context.clear();
    const MatrixBuffer<acc> scale_memory(4 * samples, scale ? scale->hidden_units() : 0);
    const MatrixBuffer<acc> shift_memory(4 * samples, shift ? shift->hidden_units() : 0);
    const auto scale_layer = HiddenLayer<acc>::in(scale_memory), shift_layer = HiddenLayer<acc>::in(shift_memory);
    const bool clips = scale && options.hard_gate;
    const MatrixBuffer<acc> clipped(samples, channels, clips);
    const Matrix<const acc> factors = clips ? Matrix<const acc>(clipped) : scale ? gate : Matrix<const acc>{};
    const PoolBackwardInputs<acc> inputs{.grad_context = grad_context,
                                         .context = context,
                                         .attention = matrix_of<const acc>(saved_attention),
                                         .weight = pointer(weight),
                                         .scale = factors,
                                         .valid = Valid(valid, positions(x))};

    for_each_group(x_map.layout, 2 * sizeof(scalar_t), weight_bytes(scale, shift), [&](int64_t first, int64_t count) {
      const auto rows = [&](const auto& matrix) { return matrix.row_range(first, count); };
      const auto g = g_map.samples(first, count), x_part = x_map.samples(first, count);
      const auto dx = grad_x_map.samples(first, count);
      const PoolBackwardInputs<acc> pool = inputs.samples(first, count);
      const Matrix<acc> dt_scale = rows(grad_t_scale), dt_shift = rows(grad_t_shift), dctx = rows(grad_context);
      const Matrix<const acc> h = rows(hidden);
      sum_samples(g, x_part, {}, dt_shift, dt_scale, before_relu.samples(first, count));
      if (scale) {
        if (clips) clip_gate(rows(gate), rows(clipped));
        apply_gate_backward(options, rows(gate), dt_scale);
        scale->backward(dt_scale, h.column_range(0, scale_units), scale_layer.samples(first, count), dctx);
      }
      if (shift) {
        shift->backward(dt_shift, h.column_range(scale_units, shift_units), shift_layer.samples(first, count), dctx);
      }
      if (forward.mask.weight) {
        const Matrix<acc> parts_of_w = parts.row_range(first * plan.splits, count * plan.splits);
        if (needs.x || needs.mask_weight) pool_backward_samples(g, x_part, pool, dx, parts_of_w);
      } else if (needs.x) {
        average_backward_samples(g, pool.scale, dctx, pool.valid, dx);
      }
    });
    if (need_weight) sum_grad_weight_parts<acc>(parts, gradients.mask_weight);
    if (needs.scale && scale) scale->parameter_gradients(grad_t_scale, context, scale_layer, gradients.scale);
    if (needs.shift && shift) shift->parameter_gradients(grad_t_shift, context, shift_layer, gradients.shift);
  });
  return gradients.results();
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  using gcnet_ext::Tensor, gcnet_ext::forward, gcnet_ext::kGlobalContext, gcnet_ext::kGlobalContextInPlace;
  using namespace gcnet_ext::cpu;
  m.impl("global_context", TORCH_BOX((&forward<kGlobalContext, &global_context_op>)));
  m.impl("global_context_inference", TORCH_BOX((&forward<kGlobalContext, &global_context_inference_op>)));
  m.impl("global_context_", TORCH_BOX((&forward<kGlobalContextInPlace, &global_context_inplace_op>)));
  m.impl("normed_global_context_inference",
         TORCH_BOX((&forward<kGlobalContext, &global_context_inference_op, Tensor, Tensor>)));
  m.impl("normed_global_context_", TORCH_BOX((&forward<kGlobalContextInPlace, &global_context_inplace_op, Tensor, Tensor>)));
  m.impl("global_context_backward", TORCH_BOX((&gcnet_ext::backward<&global_context_backward_op>)));
}
