// global_context on the CPU: the whole block, one call per direction.
//
//   forward    ctx = attention pool of x;  t = transform(ctx) per branch;  out = x*gate(t_scale) + t_shift
//   backward   ga = sum_p g, gs = sum_p g*x;  dctx through the branches;  dx = g*gate + the gradient through the pool
//
// The samples are worked on in groups that stay in the caches between the steps, so that x comes from memory once.
#include "attention_pool.h"
#include "channel_fuse.h"
#include "parallel.h"
#include "transform.h"

namespace gcnet_ext::cpu {
namespace {

template <typename acc>
std::optional<Branch<acc>> branch_of(const BranchTensors& tensors, const TransformOptions& options, const Tensor& x) {
  if (!tensors[0]) return std::nullopt;
  return Branch<acc>(tensors, options, x.size(0), x.size(1));
}

template <typename acc>
int64_t weight_bytes(const std::optional<Branch<acc>>& scale, const std::optional<Branch<acc>>& shift) {
  return (scale ? scale->weight_bytes() : 0) + (shift ? shift->weight_bytes() : 0);
}

// What a call is given beside x. The tensors are handles, in memory here and there: who has read them lets go of them, which
// takes several times as long when x has gone through the caches.
struct Parameters {
  OptionalTensor mask_weight, mask_bias;
  BranchTensors scale, shift;
};

// What the backward pass gets of the forward pass.
struct Saved {
  Tensor context, attention, hidden, gate;
};

// x and out are native; out may be x. Nothing is kept without `saved`.
void forward_into(const Tensor& x, Parameters given, const TransformOptions& options, const Tensor& out, const Saved* saved) {
  const int64_t samples = x.size(0), channels = x.size(1), attended = given.mask_weight ? positions(x) : 0;
  const int64_t scale_units = hidden_units(given.scale), units = scale_units + hidden_units(given.shift);

  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto weight = to_acc<acc>(given.mask_weight), bias = to_acc<acc>(given.mask_bias);
    auto scale = branch_of<acc>(given.scale, options, x), shift = branch_of<acc>(given.shift, options, x);
    given = {};
    const auto map = read_map<scalar_t>(x);
    const auto t_shift = shift ? buffer<acc>(samples * channels) : nullptr;
    const int64_t gates = scale ? channels : 0;
    const auto own = saved ? nullptr : buffer<acc>(samples * (channels + gates + attended + units));
    acc* ctx = saved ? mutable_data<acc>(saved->context) : own.get();
    acc* s = saved ? mutable_data<acc>(saved->gate) : ctx + samples * channels;
    acc* m = saved ? mutable_data<acc>(saved->attention) : s + samples * gates;
    acc* h = saved ? mutable_data<acc>(saved->hidden) : m + samples * attended;
    const auto clipped = scale && options.hard_sigmoid ? buffer<acc>(samples * channels) : nullptr;
    const acc* factors = clipped ? clipped.get() : s;

    const auto out_map = write_map<scalar_t>(out, x);
    const int64_t sample_bytes = channels * positions(x) * sizeof(scalar_t);
    const GroupPlan group = plan_groups(samples, sample_bytes, weight_bytes(scale, shift));
    for_each_group(group, samples, x.numel(), [&](int64_t first, int64_t count) {
      pool_samples(map, pointer(weight), bias.empty() ? acc(0) : bias[0], first, count, ctx, m);
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
      fuse_samples(map, scale ? factors : nullptr, t_shift.get(), first, count, out_map);
    });
  });
}

void check_arguments(const char* op, const Tensor& x, const Parameters& given) {
  check::feature_map(op, x);
  check::mask(op, "mask_", given.mask_weight, given.mask_bias, x);
  check::branches(op, given.scale, given.shift, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> global_context(const Tensor& x, Parameters given,
                                                                  const TransformOptions& options) {
  check_arguments("global_context", x, given);
  const int64_t samples = x.size(0), channels = x.size(1);
  const ScalarType dtype = accumulation_dtype(x);
  const Tensor out = empty_like_map(x);
  const Saved saved{empty(x, {samples, channels}, dtype), empty(x, {samples, given.mask_weight ? positions(x) : 0}, dtype),
                    empty(x, {samples, hidden_units(given.scale) + hidden_units(given.shift)}, dtype),
                    empty(x, {samples, given.scale[0] ? channels : 0}, dtype)};
  forward_into(native(x), std::move(given), options, out, &saved);
  return {out, saved.context, saved.attention, saved.hidden, saved.gate};
}

Tensor global_context_inference(const Tensor& x, Parameters given, const TransformOptions& options) {
  check_arguments("global_context", x, given);
  const Tensor out = empty_like_map(x);
  forward_into(native(x), std::move(given), options, out, nullptr);
  return out;
}

void global_context_(const Tensor& x, Parameters given, const TransformOptions& options) {
  check_arguments("global_context_", x, given);
  check::in_place("global_context_", x);
  const Tensor map = native(x);
  forward_into(map, std::move(given), options, map, nullptr);
  write_back(map, x);
}

// A forward operator with the arguments of its schema. TORCH_BOX hands over references to values of its own.
template <auto body>
auto unpacked(const Tensor& x, OptionalTensor& mask_weight, OptionalTensor& mask_bias, OptionalTensor& scale_w1,
              OptionalTensor& scale_b1, OptionalTensor& scale_norm_weight, OptionalTensor& scale_norm_bias,
              OptionalTensor& scale_w2, OptionalTensor& scale_b2, OptionalTensor& shift_w1, OptionalTensor& shift_b1,
              OptionalTensor& shift_norm_weight, OptionalTensor& shift_norm_bias, OptionalTensor& shift_w2,
              OptionalTensor& shift_b2,  //
              bool norm, double eps, bool silu, bool hard_sigmoid, double gate_alpha, double gate_beta) {
  Parameters given{std::move(mask_weight),
                   std::move(mask_bias),
                   {std::move(scale_w1), std::move(scale_b1), std::move(scale_norm_weight), std::move(scale_norm_bias),
                    std::move(scale_w2), std::move(scale_b2)},
                   {std::move(shift_w1), std::move(shift_b1), std::move(shift_norm_weight), std::move(shift_norm_bias),
                    std::move(shift_w2), std::move(shift_b2)}};
  return body(x, std::move(given), TransformOptions(norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta));
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients global_context_backward(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& mask_weight,  //
                                  const OptionalTensor& scale_w1, const OptionalTensor& scale_b1,
                                  const OptionalTensor& scale_norm_weight, const OptionalTensor& scale_norm_bias,
                                  const OptionalTensor& scale_w2, const OptionalTensor& scale_b2,
                                  const OptionalTensor& shift_w1, const OptionalTensor& shift_b1,
                                  const OptionalTensor& shift_norm_weight, const OptionalTensor& shift_norm_bias,
                                  const OptionalTensor& shift_w2,
                                  const OptionalTensor& shift_b2,  //
                                  bool norm, double eps, bool silu, bool hard_sigmoid, double gate_alpha, double gate_beta,
                                  const Tensor& context_in, const Tensor& attention_in, const Tensor& hidden_in,
                                  const Tensor& gate_in,  //
                                  bool need_x, bool need_mask, bool need_scale, bool need_shift) {
  const char* op = "global_context_backward";
  const Parameters parameters{mask_weight,
                              /*mask_bias=*/std::nullopt,
                              {scale_w1, scale_b1, scale_norm_weight, scale_norm_bias, scale_w2, scale_b2},
                              {shift_w1, shift_b1, shift_norm_weight, shift_norm_bias, shift_w2, shift_b2}};
  check_arguments(op, x_in, parameters);
  check::gradient(op, grad_in, x_in);
  const int64_t samples = x_in.size(0), channels = x_in.size(1), scale_units = hidden_units(parameters.scale);
  const int64_t units = scale_units + hidden_units(parameters.shift);
  check::side(op, "context", context_in, x_in, {samples, channels});
  check::side(op, "attention", attention_in, x_in, {samples, mask_weight ? positions(x_in) : 0});
  check::side(op, "hidden", hidden_in, x_in, {samples, units});
  check::side(op, "gate_values", gate_in, x_in, {samples, scale_w1 ? channels : 0});
  const TransformOptions options(norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta);

  const Tensor grad = native_like(grad_in, x_in), x = native(x_in);
  const Tensor context = dense(context_in), attention = dense(attention_in), hidden = dense(hidden_in), gate = dense(gate_in);
  const Tensor grad_x = need_x ? empty_like_map(x_in) : no_gradient(x_in);
  const Tensor grad_mask = gradient_of(need_mask, mask_weight, x_in);
  std::array<Tensor, 6> grad_scale, grad_shift;
  for (size_t i = 0; i < grad_scale.size(); i++) {
    grad_scale[i] = gradient_of(need_scale, parameters.scale[i], x_in);
    grad_shift[i] = gradient_of(need_shift, parameters.shift[i], x_in);
  }

  dispatch(x.scalar_type(), [&](auto kind) {
    using scalar_t = decltype(kind);
    using acc = acc_t<scalar_t>;
    const auto weight = to_acc<acc>(mask_weight);
    auto scale = branch_of<acc>(parameters.scale, options, x), shift = branch_of<acc>(parameters.shift, options, x);
    const auto map = read_map<scalar_t>(x), grad_map = read_map<scalar_t>(grad);
    const auto grad_x_map = write_map_if<scalar_t>(need_x, grad_x, grad, x);
    const acc *ctx = data<acc>(context), *h = data<acc>(hidden), *s = scale ? data<acc>(gate) : nullptr;
    if (scale) scale->prepare_backward();
    if (shift) shift->prepare_backward();

    const PoolPlan plan = pool_plan(map);
    const auto grad_weight =
        need_mask && mask_weight ? WeightGradient<acc>(samples, plan.splits, channels) : WeightGradient<acc>();
    const auto grad_t_scale = scale ? buffer<acc>(samples * channels) : nullptr;
    const auto grad_t_shift = shift ? buffer<acc>(samples * channels) : nullptr;
    const auto grad_context = zeros<acc>(samples * channels);
    const auto clipped = scale && options.hard_sigmoid ? buffer<acc>(samples * channels) : nullptr;
    const acc* factors = clipped ? clipped.get() : s;
    const PoolGradients<acc> given{grad_context.get(), ctx, data<acc>(attention), pointer(weight), factors};

    const int64_t sample_bytes = 2 * channels * positions(x) * sizeof(scalar_t);
    const GroupPlan group = plan_groups(samples, sample_bytes, weight_bytes(scale, shift));
    for_each_group(group, samples, x.numel(), [&](int64_t first, int64_t count) {
      const int64_t begin = first * channels;
      sum_samples(grad_map, map, first, count, grad_t_shift.get(), grad_t_scale.get());
      if (scale) {
        if (clipped) clip_gate(s + begin, count * channels, clipped.get() + begin);
        apply_gate_backward(options, s + begin, grad_t_scale.get() + begin, count * channels);
        scale->backward(grad_t_scale.get(), h, units, first, count, grad_context.get());
      }
      if (shift) shift->backward(grad_t_shift.get(), h + scale_units, units, first, count, grad_context.get());
      if (mask_weight) {
        if (need_x || need_mask) pool_backward_samples(grad_map, map, given, first, count, grad_x_map, grad_weight);
      } else if (need_x) {
        for (int64_t i = begin; i < begin + count * channels; i++) grad_context[i] /= acc(positions(x));  // m_p = 1/P
        fuse_samples(grad_map, factors, static_cast<const acc*>(grad_context.get()), first, count, grad_x_map);
      }
    });
    if (need_mask && mask_weight) from_acc(grad_weight.total().data(), grad_mask);
    if (need_scale && scale) scale->parameter_gradients(grad_t_scale.get(), ctx, grad_scale);
    if (need_shift && shift) shift->parameter_gradients(grad_t_shift.get(), ctx, grad_shift);
  });
  return {grad_x,        grad_mask,     grad_scale[0], grad_scale[1], grad_scale[2], grad_scale[3], grad_scale[4],
          grad_scale[5], grad_shift[0], grad_shift[1], grad_shift[2], grad_shift[3], grad_shift[4], grad_shift[5]};
}

}  // namespace
}  // namespace gcnet_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(gcnet_ext, CPU, m) {
  m.impl("global_context", TORCH_BOX(&gcnet_ext::cpu::unpacked<&gcnet_ext::cpu::global_context>));
  m.impl("global_context_inference", TORCH_BOX(&gcnet_ext::cpu::unpacked<&gcnet_ext::cpu::global_context_inference>));
  m.impl("global_context_", TORCH_BOX(&gcnet_ext::cpu::unpacked<&gcnet_ext::cpu::global_context_>));
  m.impl("global_context_backward", TORCH_BOX(&gcnet_ext::cpu::global_context_backward));
}
