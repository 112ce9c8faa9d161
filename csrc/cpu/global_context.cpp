// global_context on the CPU: the whole block, one call per direction.
//
//   forward    ctx = attention pool of x;  t = transform(ctx) per branch;  out = act(x*gate(t_scale) + t_shift + residual)
//   backward   g through act;  ga = sum_p g, gs = sum_p g*x;  dctx through the branches;  dx = g*gate + the gradient of the pool
//
// The samples are worked on in groups that stay in the caches between the steps, so that x comes from memory once.
#include "attention_pool.h"
#include "channel_fuse.h"
#include "parallel.h"
#include "transform.h"

namespace gcnet_ext::cpu {
namespace {

template <typename acc>
std::optional<BranchPass<acc>> pass_of(const Branch& branch, const Options& options, const Tensor& x) {
  if (!branch) return std::nullopt;
  return BranchPass<acc>(branch, options, x.size(0), x.size(1));
}

template <typename acc>
int64_t weight_bytes(const std::optional<BranchPass<acc>>& scale, const std::optional<BranchPass<acc>>& shift) {
  return (scale ? scale->weight_bytes() : 0) + (shift ? shift->weight_bytes() : 0);
}

// x and out are native; out may be x. Nothing is kept without `saved`.
void forward_into(const Tensor& x, Arguments& given, const Tensor& out, const Saved* saved) {
  const int64_t samples = x.size(0), channels = x.size(1), attended = given.mask.weight ? positions(x) : 0;
  const int64_t scale_units = given.scale.units(), units = given.units();
  const bool clips = given.scale && given.options.hard_gate;
  const OptionalTensor residual = residual_of(given.residual, x, /*in_place=*/out.data_ptr() == x.data_ptr());

  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto weight = to_acc<acc>(given.mask.weight), bias = to_acc<acc>(given.mask.bias);
    auto scale = pass_of<acc>(given.scale, given.options, x), shift = pass_of<acc>(given.shift, given.options, x);
    // Their handles are released as soon as they are read: that is several times slower once x has evicted them from the caches.
    given.mask = {}, given.scale = {}, given.shift = {};
    const auto map = read_map<scalar_t>(x);
    const auto t_shift = shift ? buffer<acc>(samples * channels) : nullptr;
    const int64_t gates = scale ? channels : 0;
    const auto own = saved ? nullptr : buffer<acc>(samples * (channels + gates + attended + units));
    acc* ctx = saved ? mutable_data<acc>(saved->context) : own.get();
    acc* s = saved ? mutable_data<acc>(saved->gate_values) : ctx + samples * channels;
    acc* m = saved ? mutable_data<acc>(saved->attention) : s + samples * gates;
    acc* h = saved ? mutable_data<acc>(saved->hidden) : m + samples * attended;
    const auto clipped = clips ? buffer<acc>(samples * channels) : nullptr;
    const acc* factors = clipped ? clipped.get() : s;

    const PoolInputs<acc> pooled{pointer(weight), bias.empty() ? acc(0) : bias[0], Valid(given.valid, positions(x))};
    const Fusions<scalar_t> fusions{scale ? factors : nullptr, t_shift.get(), read_map<scalar_t>(residual),
                                    given.options.has_final_relu(),
                                    saved ? bits_of<uint8_t>(saved->positive, map.layout) : BitMap<uint8_t>{}};
    const auto out_map = write_map<scalar_t>(out, x);
    const int64_t sample_bytes = channels * positions(x) * sizeof(scalar_t);
    const GroupPlan group = plan_groups(samples, sample_bytes, weight_bytes(scale, shift));
    for_each_group(group, samples, x.numel(), [&](int64_t first, int64_t count) {
      pool_samples(map, pooled, first, count, ctx, m);
      const auto branch = [&](int64_t i) {
        if (i == 0) {
          scale->forward(ctx, first, count, h, units, /*gated=*/true, s);
        } else {
          shift->forward(ctx, first, count, h + scale_units, units, /*gated=*/false, t_shift.get());
        }
      };
      if (scale && shift && count == 1 && !scale->row_parallel() && !shift->row_parallel()) {  // each is one thread's work
        parallel_for(2, 2 * channels * units, branch);
      } else {
        if (scale) branch(0);
        if (shift) branch(1);
      }
      if (clipped) clip_gate(s + first * channels, count * channels, clipped.get() + first * channels);
      fuse_samples(map, fusions, first, count, out_map);
    });
  });
}

ForwardResults global_context(Arguments& given) {
  const Tensor& x = given.x;
  const int64_t samples = x.size(0), channels = x.size(1);
  const ScalarType dtype = accumulation_dtype(x);
  const Tensor out = empty_like_map(x);
  const Saved saved{empty(x, {samples, channels}, dtype), empty(x, {samples, given.mask.weight ? positions(x) : 0}, dtype),
                    empty(x, {samples, given.units()}, dtype), empty(x, {samples, given.scale ? channels : 0}, dtype),
                    empty_bits(x, given.options.has_final_relu())};
  forward_into(native(x), given, out, &saved);
  return {out, saved.context, saved.attention, saved.hidden, saved.gate_values, saved.positive};
}

Tensor global_context_inference(Arguments& given) {
  const Tensor out = empty_like_map(given.x);
  forward_into(native(given.x), given, out, nullptr);
  return out;
}

void global_context_(Arguments& given) {
  check::in_place(kGlobalContextInPlace, given.x, given.residual);
  const Tensor map = native(given.x);
  forward_into(map, given, map, nullptr);
  write_back(map, given.x);
}

BackwardResults global_context_backward(const BackwardArguments& call) {
  const Arguments& forward = call.forward;
  const Saved& saved = call.saved;
  const Needs& needs = call.needs;
  const Tensor &grad_in = call.grad, &x_in = forward.x;
  const OptionalTensor& mask_weight = forward.mask.weight;
  const Options& options = forward.options;
  const int64_t samples = x_in.size(0), channels = x_in.size(1), scale_units = forward.scale.units(), units = forward.units();
  const Tensor grad = native_like(grad_in, x_in), x = native(x_in);
  const Tensor context = dense(saved.context), attention = dense(saved.attention), hidden = dense(saved.hidden);
  const Tensor gate = dense(saved.gate_values), positive = dense(saved.positive);
  const BackwardTensors gradients = gradients_of(call);
  const bool relu = options.has_final_relu();
  const Tensor through = relu ? masked_gradient(x_in, gradients.residual, gradients.x) : grad;

  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto weight = to_acc<acc>(mask_weight);
    auto scale = pass_of<acc>(forward.scale, options, x), shift = pass_of<acc>(forward.shift, options, x);
    const auto map = read_map<scalar_t>(x), grad_map = read_map<scalar_t>(through);
    const auto before_relu = through_relu<scalar_t>(relu, grad, positive, through);
    const auto grad_x_map = write_map_if<scalar_t>(needs.x, gradients.x, through, x);
    const Valid valid(forward.valid, positions(x));
    const acc *ctx = data<acc>(context), *h = data<acc>(hidden), *s = scale ? data<acc>(gate) : nullptr;
    if (scale) scale->prepare_backward();
    if (shift) shift->prepare_backward();

    const PoolPlan plan = pool_plan(map);
    const auto grad_weight =
        needs.mask_weight && mask_weight ? WeightGradient<acc>(samples, plan.splits, channels) : WeightGradient<acc>();
    const auto grad_t_scale = scale ? buffer<acc>(samples * channels) : nullptr;
    const auto grad_t_shift = shift ? buffer<acc>(samples * channels) : nullptr;
    const auto grad_context = zeros<acc>(samples * channels);
    const auto clipped = scale && options.hard_gate ? buffer<acc>(samples * channels) : nullptr;
    const acc* factors = clipped ? clipped.get() : s;
    const PoolGradients<acc> given{grad_context.get(), ctx, data<acc>(attention), pointer(weight), factors, valid};

    const int64_t sample_bytes = 2 * channels * positions(x) * sizeof(scalar_t);
    const GroupPlan group = plan_groups(samples, sample_bytes, weight_bytes(scale, shift));
    for_each_group(group, samples, x.numel(), [&](int64_t first, int64_t count) {
      const int64_t begin = first * channels;
      sum_samples(grad_map, map, {}, first, count, grad_t_shift.get(), grad_t_scale.get(), before_relu);
      if (scale) {
        if (clipped) clip_gate(s + begin, count * channels, clipped.get() + begin);
        apply_gate_backward(options, s + begin, grad_t_scale.get() + begin, count * channels);
        scale->backward(grad_t_scale.get(), h, units, first, count, grad_context.get());
      }
      if (shift) shift->backward(grad_t_shift.get(), h + scale_units, units, first, count, grad_context.get());
      if (mask_weight) {
        if (needs.x || needs.mask_weight) pool_backward_samples(grad_map, map, given, first, count, grad_x_map, grad_weight);
      } else if (needs.x) {
        for (int64_t n = first; n < first + count; n++) divide_by_count(valid, n, channels, grad_context.get() + n * channels);
        average_backward_samples<scalar_t>(grad_map, factors, grad_context.get(), valid, first, count, grad_x_map);
      }
    });
    if (needs.mask_weight && mask_weight) from_acc(grad_weight.total().data(), gradients.mask_weight);
    if (needs.scale && scale) scale->parameter_gradients(grad_t_scale.get(), ctx, gradients.scale);
    if (needs.shift && shift) shift->parameter_gradients(grad_t_shift.get(), ctx, gradients.shift);
  });
  return gradients.results();
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("global_context", TORCH_BOX((&gcnet_ext::forward<gcnet_ext::kGlobalContext, &gcnet_ext::cpu::global_context>)));
  m.impl("global_context_inference",
         TORCH_BOX((&gcnet_ext::forward<gcnet_ext::kGlobalContext, &gcnet_ext::cpu::global_context_inference>)));
  m.impl("global_context_",
         TORCH_BOX((&gcnet_ext::forward<gcnet_ext::kGlobalContextInPlace, &gcnet_ext::cpu::global_context_>)));
  m.impl("global_context_backward", TORCH_BOX((&gcnet_ext::backward<&gcnet_ext::cpu::global_context_backward>)));
}
