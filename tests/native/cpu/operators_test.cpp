// The CPU operators as they are, under a sanitizer: a grid of shapes, layouts and dtypes, forward and backward, at 1, 2 and 5
// threads, some of it at 16 and 64, more than there are cores. Against float64 by ATen, and bit for bit between the numbers of
// threads.
//
// Buffers end where the last element does, so that AddressSanitizer sees the first byte past it. The CPU capability is the
// environment's, GCNET_EXT_CPU_CAPABILITY; the program ends with 77 where this processor does not have it.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../../../csrc/cpu/capability.h"
#include "../../../csrc/cpu/threads.h"
#include "team.h"

namespace {

using Tensors = std::vector<at::Tensor>;

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  failures++;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// The outputs of an operator of gcnet_ext, those of a list one by one.
Tensors call(const char* name, std::vector<c10::IValue> stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow((std::string("gcnet_ext::") + name).c_str(), "").callBoxed(&stack);
  Tensors outputs;
  for (const c10::IValue& value : stack) {
    if (value.isTensor()) {
      outputs.push_back(value.toTensor());
    } else {
      for (const at::Tensor& tensor : value.toTensorVector()) outputs.push_back(tensor);
    }
  }
  return outputs;
}

// An optional tensor: none where it is undefined.
c10::IValue optional(const at::Tensor& tensor) { return tensor.defined() ? c10::IValue(tensor) : c10::IValue(); }

// The values in memory of exactly their size, and in their strides.
at::Tensor exact(const at::Tensor& values) {
  const size_t bytes = values.numel() * values.element_size();
  const std::shared_ptr<char[]> memory(new char[bytes]);
  at::Tensor copy = at::from_blob(memory.get(), values.sizes(), values.strides(), [memory](void*) {}, values.options());
  copy.copy_(values);
  return copy;
}

struct Case {
  std::vector<int64_t> sizes;
  at::ScalarType dtype;
  bool channels_last, attention, mul, add;
  bool more = false;  // a residual, a final ReLU, positions that do not count, and GELU

  std::string name() const {
    std::string text = at::toString(dtype);
    for (const int64_t size : sizes) text += "x" + std::to_string(size);
    return text + (channels_last ? " channels_last" : " contiguous") + (attention ? " att" : " avg") + (mul ? " mul" : "") +
           (add ? " add" : "") + (more ? " with a residual, ReLU, valid and GELU" : "");
  }
};

at::Tensor feature_map(const Case& of) {
  at::Tensor x = at::randn(of.sizes, at::kDouble) + 0.25;
  if (of.channels_last) x = x.movedim(1, -1).contiguous().movedim(-1, 1);
  return exact(x.to(of.dtype));
}

// The tensors of the block; undefined where there is none.
struct Inputs {
  at::Tensor x;
  Tensors mask;          // weight, bias
  Tensors scale, shift;  // w1, b1, norm_weight, norm_bias, w2, b2
  at::Tensor residual, valid;

  Inputs map(const std::function<at::Tensor(const at::Tensor&)>& f) const {
    const auto each = [&](const Tensors& tensors) {
      Tensors mapped;
      for (const at::Tensor& tensor : tensors) mapped.push_back(tensor.defined() ? f(tensor) : tensor);
      return mapped;
    };
    return {f(x), each(mask), each(scale), each(shift), residual.defined() ? f(residual) : residual, valid};
  }
};

Inputs inputs_of(const Case& of, int64_t hidden) {
  const int64_t channels = of.sizes[1];
  const auto parameter = [&](std::vector<int64_t> sizes, double std) {
    return exact((at::randn(sizes, at::kDouble) * std).to(of.dtype));
  };
  const auto branch = [&](bool there) -> Tensors {
    if (!there) return Tensors(6);
    const at::Tensor w1 = parameter({hidden, channels}, 2 / std::sqrt(channels)), b1 = parameter({hidden}, 1);
    const at::Tensor norm_weight = parameter({hidden}, 1), norm_bias = parameter({hidden}, 1);
    const at::Tensor w2 = parameter({channels, hidden}, 1.5 / std::sqrt(hidden)), b2 = parameter({channels}, 1);
    return {w1, b1, norm_weight, norm_bias, w2, b2};
  };
  Inputs inputs{feature_map(of), Tensors(2), {}, {}, {}, {}};
  if (of.attention) inputs.mask = {parameter({channels}, 1.5 / std::sqrt(channels)), parameter({1}, 1)};
  inputs.scale = branch(of.mul);
  inputs.shift = branch(of.add);
  if (of.more) {
    std::vector<int64_t> sizes = of.sizes;
    sizes.erase(sizes.begin() + 1);
    inputs.residual = feature_map(of);
    inputs.valid = exact(at::rand(sizes) < 0.7);
  }
  return inputs;
}

at::Tensor reference(const Inputs& in) {
  const at::Tensor x = in.x.flatten(2);  // [N, C, P]
  const bool more = in.valid.defined();
  const at::Tensor valid = more ? in.valid.flatten(1) : at::ones({x.size(0), x.size(2)}, at::kBool);
  at::Tensor weights = valid.to(at::kDouble);
  if (in.mask[0].defined()) {
    const at::Tensor logits = at::einsum("ncp,c->np", {x, in.mask[0]}) + in.mask[1];
    weights = weights * at::exp(logits - logits.amax(1, true).detach());
  }
  const at::Tensor context = at::einsum("ncp,np->nc", {x, weights}) / weights.sum(1, true).clamp_min(1e-300);
  const auto branch = [&](const Tensors& of) {
    const at::Tensor hidden = at::linear(context, of[0], of[1]);
    const at::Tensor normed = at::layer_norm(hidden, {hidden.size(1)}, of[2], of[3]);
    return at::linear(more ? at::gelu(normed) : at::relu(normed), of[4], of[5]);
  };
  at::Tensor out = x;
  if (in.scale[0].defined()) out = out * at::sigmoid(branch(in.scale)).unsqueeze(2);
  if (in.shift[0].defined()) out = out + branch(in.shift).unsqueeze(2);
  out = out.view(in.x.sizes());
  return more ? at::relu(out + in.residual) : out;
}

c10::IValue list_of(const Tensors& tensors) {
  c10::List<std::optional<at::Tensor>> list;
  for (const at::Tensor& tensor : tensors) list.push_back(tensor.defined() ? std::optional(tensor) : std::nullopt);
  return list;
}

// The arguments of a forward operator: the tensors, and a norm, ReLU or GELU, and a sigmoid.
std::vector<c10::IValue> stack_of(const Inputs& in) {
  const c10::IValue none;
  const bool more = in.valid.defined();
  return {in.x,
          list_of(in.mask),
          list_of(in.scale),
          list_of(in.shift),
          optional(in.residual),
          optional(in.valid),
          /*eps=*/1e-5,
          /*activation=*/more ? 3 : 1,
          /*slope=*/.01,
          /*hard_gate=*/none,
          /*final_activation=*/more ? 1 : 0};
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return x.numel() == 0 || std::memcmp(x.data_ptr(), y.data_ptr(), x.numel() * x.element_size()) == 0;
}

// Everything that the operators of the block, and those of its parts, return.
Tensors outputs_of(const Inputs& inputs, const at::Tensor& grad) {
  const c10::IValue none;
  const Tensors forward = call("global_context", stack_of(inputs));
  const Tensors saved(forward.begin() + 1, forward.end());
  std::vector<c10::IValue> stack = stack_of(inputs);
  stack.erase(stack.begin() + 4);  // the residual
  stack.insert(stack.begin(), grad);
  stack.emplace_back(saved);
  stack.emplace_back(c10::List<bool>{true, true, true, true, true, true});
  Tensors outputs = call("global_context_backward", stack);
  outputs.insert(outputs.begin(), forward.begin(), forward.end());

  const at::Tensor &x = inputs.x, &weight = inputs.mask[0], &context = forward[1], &attention = forward[2];
  const at::Tensor& positive = forward[5];
  for (const at::Tensor& part :
       call("attention_pool_backward", {context, x, optional(weight), optional(inputs.mask[1]), optional(inputs.valid), context,
                                        attention, c10::List<bool>{true, true, true}})) {
    outputs.push_back(part);
  }
  const at::Tensor factors = context.to(x.scalar_type());
  for (const at::Tensor& part : call("channel_fuse_backward", {grad, x, factors, factors, inputs.valid.defined() ? 1 : 0,
                                                               positive, c10::List<bool>{true, true, true, true}})) {
    outputs.push_back(part);
  }
  const at::Tensor fused = exact(x);
  call("channel_fuse_", {fused, factors, none, optional(inputs.residual), inputs.valid.defined() ? 1 : 0});
  outputs.push_back(fused);

  Inputs overwritten = inputs;
  overwritten.x = exact(x);
  call("global_context_", stack_of(overwritten));
  for (const at::Tensor& out : {call("global_context_inference", stack_of(inputs))[0], overwritten.x}) {
    expect(same_bits(out, outputs[0]), "the output where nothing is kept");
  }
  const at::Tensor one = exact(at::ones({x.size(1)}, x.options())), zero = exact(at::zeros({x.size(1)}, x.options()));
  const auto with_norm = [&](const Inputs& in) {
    std::vector<c10::IValue> stack = stack_of(in);
    stack.insert(stack.end(), {one, zero});
    return stack;
  };
  overwritten.x = exact(x);
  call("normed_global_context_", with_norm(overwritten));
  for (const at::Tensor& out : {call("normed_global_context_inference", with_norm(inputs))[0], overwritten.x}) {
    expect(same_bits(out, outputs[0]), "the output of a norm that changes nothing");
  }
  return outputs;
}

void close(const at::Tensor& got, const at::Tensor& want, double tolerance, const std::string& what) {
  const double largest = want.numel() ? want.abs().max().item<double>() : 0;
  const double difference = want.numel() ? (got.to(at::kDouble) - want).abs().max().item<double>() : 0;
  expect(difference <= tolerance * (1 + largest), what + ": off by " + std::to_string(difference));
}

void run(const Case& of, int64_t hidden, bool many_threads = false) {
  at::manual_seed(1);
  const Inputs inputs = inputs_of(of, hidden);
  const at::Tensor grad = feature_map(of);
  gcnet_ext::cpu::set_threads(1);
  const Tensors outputs = outputs_of(inputs, grad);
  std::vector<int64_t> all_threads{2, 5}, regions;
  if (many_threads) all_threads.insert(all_threads.end(), {16, 64});
  for (const int64_t threads : all_threads) {
    gcnet_ext::cpu::set_threads(threads);
    const int64_t before = gcnet_ext::cpu::parallel_regions();
    const Tensors again = outputs_of(inputs, grad);
    regions.push_back(gcnet_ext::cpu::parallel_regions() - before);
    for (size_t i = 0; i < outputs.size(); i++) {
      expect(same_bits(outputs[i], again[i]), of.name() + ": output " + std::to_string(i) + " at " + std::to_string(threads));
    }
  }
  // Where there are more threads than samples, it does not depend on their number how often they are started and waited for.
  if (many_threads) expect(regions[3] <= regions[2], of.name() + ": 64 threads meet more often than 16");

  const Inputs leaves = inputs.map([](const at::Tensor& input) { return input.to(at::kDouble).clone().requires_grad_(); });
  const at::Tensor want = reference(leaves);
  const double tolerance = of.dtype == at::kDouble ? 1e-10 : of.dtype == at::kFloat ? 2e-4 : 3e-2;
  close(outputs[0], want.detach(), tolerance, of.name() + ": out");
  Tensors wanted{leaves.x};
  if (leaves.mask[0].defined()) wanted.push_back(leaves.mask[0]);
  if (leaves.residual.defined()) wanted.push_back(leaves.residual);
  const auto grads = torch::autograd::grad({want}, wanted, {grad.to(at::kDouble)});
  // Where the argument of the final ReLU is near to 0, it may let pass in one dtype and not in the other.
  const auto close_but_for_a_few = [&](const at::Tensor& got, const at::Tensor& want, const std::string& what) {
    const at::Tensor differs = (got.to(at::kDouble) - want).abs() > tolerance * (1 + want.abs().max());
    expect(differs.sum().item<int64_t>() * 50 <= differs.numel(), of.name() + what);
  };
  if (of.more && grads[0].numel() > 0) {
    close_but_for_a_few(outputs[6], grads[0], ": dx");
    close_but_for_a_few(outputs[21], grads.back(), ": the gradient of the residual");
  } else {
    close(outputs[6], grads[0], tolerance, of.name() + ": dx");
  }
  if (leaves.mask[0].defined()) {  // a sum over all positions
    close(outputs[7], grads[1], tolerance * 10, of.name() + ": dw");
  }
}

// Mistakes that the sanitizers have to report, else what they do not report means nothing.
void race() {
  int64_t shared = 0;
  gcnet_ext::cpu::run_on_threads(2, [&](int64_t rank, int64_t) { shared += rank; });
}
void overrun() {
  const std::shared_ptr<char[]> memory(new char[4 * 99]);
  std::memset(memory.get(), 0, 4 * 99);
  const at::Tensor x = at::from_blob(memory.get(), {1, 10, 10}, [memory](void*) {}, at::kFloat);
  call("attention_pool", {x, at::ones({10}), c10::IValue(), c10::IValue()});
}

}  // namespace

int main(int count, char** arguments) {
  const std::string option = count > 1 ? arguments[1] : "";
  const bool small = option == "--small";
  if (option == "race") return race(), 0;
  if (option == "overrun") return overrun(), 0;
  const char* wanted = std::getenv("GCNET_EXT_CPU_CAPABILITY");
  const auto usable = gcnet_ext::cpu::usable_capabilities();
  if (wanted && std::find(usable.begin(), usable.end(), wanted) == usable.end()) {
    std::printf("this processor does not have %s\n", wanted);
    return 77;
  }
  // One position, rows that are no multiple of a vector, one of them cut by channels, one by tiles, one large enough for both
  // ways of sharing work between threads, one whose branches are two threads' work, one whose weights are shared.
  std::vector<std::vector<int64_t>> shapes{{2, 3, 1},    {3, 10, 7, 7},  {2, 33, 5, 10}, {3, 64, 30, 31},
                                           {1, 5, 5003}, {1, 256, 9, 9}, {2, 2100, 2, 3}};
  if (!small) shapes.insert(shapes.end(), {{0, 8, 3, 3}, {1, 1, 4, 5}, {7, 100, 3, 5, 7}, {9, 256, 14, 14}});
  // How large maps are cut does not depend on the loops, and AddressSanitizer sees most of the portable ones.
  if (!small && gcnet_ext::cpu::capability() == "default") shapes.insert(shapes.end(), {{2, 300, 45, 97}, {1, 48, 30000}});
  std::vector<at::ScalarType> dtypes{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
  if (gcnet_ext::cpu::capability() == "avx512_bf16") dtypes = {at::kBFloat16};  // the others are those of avx512
  int cases = 0;
  // Rows of 16-bit numbers from one to two vectors and one: positions in the one layout, channels in the other.
  for (const at::ScalarType dtype : dtypes) {
    if (small || at::elementSize(dtype) != 2) continue;
    for (int64_t length = 1; length <= 33; length++) {
      run({{2, 3, length}, dtype, /*channels_last=*/false, true, true, true}, 4);
      run({{2, length, 3}, dtype, /*channels_last=*/true, true, true, true}, 4);
      cases += 2;
    }
  }
  for (const auto& sizes : shapes) {
    for (const at::ScalarType dtype : dtypes) {
      for (const bool channels_last : {false, true}) {
        for (const int choice : {0, 1, 2, 3}) {
          const Case of{sizes, dtype, channels_last, choice != 3, choice != 1, choice != 2};
          run(of, sizes[1] > 200 ? 70 : 4, /*many_threads=*/choice == 0 && dtype == at::kFloat);
          cases++;
          if (choice != 0 && choice != 3) continue;  // both branches, and average pooling
          Case with_more = of;
          with_more.more = true;
          run(with_more, sizes[1] > 200 ? 70 : 4);
          cases++;
        }
      }
    }
  }
  std::printf("%d cases, %d failures, %s\n", cases, failures, gcnet_ext::cpu::capability().c_str());
  return failures != 0;
}
