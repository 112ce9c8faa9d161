"""Mistakes in the ops in Python: functions, gradients, shapes and checks."""

from __future__ import annotations

from mutant import Mutant

BLOCK = "test_global_context.py"
BAD_INPUT = "test_bad_input.py"
DISPATCH = "test_dispatch.py"
FLOPS = "test_flops.py"
IN_PLACE = "test_in_place.py"
POOL = "test_attention_pool.py"
DERIVATIVES = "test_derivatives.py"
EVERY = "test_every_op.py"
LAYOUTS = "test_layouts.py"
COMPILE = "test_compile.py"
PUBLIC = "test_public_torch.py"
HARD_SIGMOID = "test_hard_sigmoid.py"

MUTANTS = (
    Mutant(
        "version-not-bumped",
        "gcnet_ext/ops/_dispatch.py",
        "«torch.autograd.graph.increment_version(x)»  # a graph",
        "pass",
        "A graph that saved an x does not notice that it was overwritten, and its gradient is wrong.",
        (IN_PLACE,),
    ),
    Mutant(
        "kernels-inside-vmap",
        "gcnet_ext/ops/_dispatch.py",
        "if plain or «_torch.inside_transform()»:",
        "False",
        "torch.func's transforms get the kernels, which know nothing of them.",
        (DERIVATIVES,),
    ),
    Mutant(
        "lazy-minus-sign",
        "gcnet_ext/ops/_dispatch.py",
        "«x.copy_(positive)»",
        "pass",
        "An x with a lazy minus sign is not overwritten.",
        ("test_fuzz.py::test_x_with_a_lazy_minus_sign",),
    ),
    Mutant(
        "needs-of-the-last-bias",
        "gcnet_ext/ops/global_context.py",
        "any(«need_scale»)",
        "need_scale[:5]",
        "The last bias of the scale alone has no gradient.",
        (BLOCK, EVERY),
    ),
    Mutant(
        "needs-shifted-by-one",
        "gcnet_ext/ops/_global_context_arguments.py",
        "tensors[3:9], «tensors[9:15]», tensors[15]",
        "tensors[8:14]",
        "The weights of the shift are taken from one place before.",
        (BLOCK, EVERY),
    ),
    Mutant(
        "bias-of-the-mask-unused",
        "gcnet_ext/ops/global_context.py",
        "wanted = need_x, «*need_mask», any(need_scale)",
        "need_mask[0], False",
        "The bias of the mask has no gradient, and DistributedDataParallel takes it for unused.",
        (BLOCK, EVERY),
    ),
    Mutant(
        "shapes-one-channel",
        "gcnet_ext/ops/_relu_bits.py",
        "if «channels == 1 or x.stride(1) != 1» or all",
        "x.stride(1) != 1",
        "The shape function takes one channel with a stride of one for channels_last.",
        (LAYOUTS,),
    ),
    Mutant(
        "shapes-dtype-of-hidden",
        "gcnet_ext/ops/_shapes.py",
        "return x.new_empty(sizes«, dtype=accumulation_dtype(x)»)",
        "",
        "The shape function gives the hidden units the dtype of x.",
        (DISPATCH,),
    ),
    Mutant(
        "shapes-needs-mixed-up",
        "gcnet_ext/ops/global_context.py",
        "shift=_shapes.gradients(«needs.shift», call.shift, x),",
        "needs.scale",
        "The shape function has gradients of the shift where those of the scale are needed.",
        (COMPILE, DISPATCH),
    ),
    Mutant(
        "check-any-floating-parameter",
        "gcnet_ext/ops/_checks.py",
        "if tensor.dtype not in «(torch.float32, x.dtype)»:",
        "FLOATING",
        "A parameter of any floating dtype is let through.",
        (BAD_INPUT,),
    ),
    Mutant(
        "check-overlap-on-meta",
        "gcnet_ext/ops/_checks.py",
        "if stride «<=» reach:",
        "<",
        "The shape function lets elements through that overlap by one.",
        (IN_PLACE, BAD_INPUT),
    ),
    Mutant(
        "check-no-hidden-units",
        "gcnet_ext/ops/_transform.py",
        "if «hidden == 0»:",
        "False",
        "A branch without hidden units is let through.",
        (BAD_INPUT,),
    ),
    Mutant(
        "check-half-a-transform",
        "gcnet_ext/ops/_transform.py",
        "isinstance(weights, tuple)« and len(weights) == len(Branch._fields)»",
        "",
        "A tuple of any length is taken for a Branch.",
        ("test_fuzz.py::test_a_branch_that_is_none",),
    ),
    Mutant(
        "reference-sums-in-half",
        "gcnet_ext/ops/_precision.py",
        "return «torch.float64 if x.dtype == torch.float64 else torch.float32»",
        "x.dtype",
        "Plain PyTorch sums in the dtype of x.",
        (POOL, EVERY),
    ),
    Mutant(
        "reference-under-autocast",
        "gcnet_ext/ops/_precision.py",
        "torch.autocast(device, enabled=«False»)",
        "True",
        "Autocast is not switched off in plain PyTorch.",
        (DISPATCH,),
    ),
    Mutant(
        "alpha-and-beta-swapped",
        "gcnet_ext/ops/_options.py",
        "hard_gate = («self.gate_alpha, self.gate_beta») if",
        "self.gate_beta, self.gate_alpha",
        "Slope and offset of the hard sigmoid are swapped.",
        (HARD_SIGMOID,),
    ),
    Mutant(
        "scale-and-shift-swapped",
        "gcnet_ext/ops/_global_context_arguments.py",
        "return cls(x, mask, «list(scale or NO_BRANCH), list(shift or NO_BRANCH)», residual",
        "list(shift or NO_BRANCH), list(scale or NO_BRANCH)",
        "The branch that adds multiplies, and the other way round.",
        (LAYOUTS, BLOCK, EVERY),
    ),
    Mutant(
        "fallback-map-with-a-graph",
        "gcnet_ext/ops/attention_pool.py",
        "return reference_map(x, *given, valid=valid)«.detach()»",
        "",
        "In plain PyTorch a map of the attention drags its graph along.",
        (DISPATCH,),
    ),
    Mutant(
        "fallback-overwrites-for-training",
        "gcnet_ext/ops/global_context.py",
        '_checks.no_gradient("global_context_", «call»)',
        "call[:1]",
        "In plain PyTorch x is overwritten although a weight needs its gradient.",
        (IN_PLACE,),
    ),
    Mutant(
        "flops-of-the-mask-alone",
        "gcnet_ext/ops/attention_pool.py",
        "«(need_x or need_weight)» + need_weight)",
        "(need_x and need_weight)",
        "Where x needs no gradient, the gradient of the attention is not counted.",
        (FLOPS, EVERY),
    ),
    Mutant(
        "flops-additions",
        "gcnet_ext/ops/attention_pool.py",
        "«2 * 2 * prod(x)»",
        "2 * prod(x)",
        "The pool is counted as one product instead of two.",
        (FLOPS, EVERY),
    ),
    Mutant(
        "public-results-of-inference-mode",
        "gcnet_ext/_torch.py",
        "return «tree_map_only(Tensor, Tensor.clone, results)»",
        "results",
        "Without torch's private names the results of a kernel cannot be saved for a backward pass.",
        (PUBLIC,),
    ),
)
