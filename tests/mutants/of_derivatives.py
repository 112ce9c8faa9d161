"""Mistakes in derivatives with create_graph=True, in which layers are called, and in how they are."""

from __future__ import annotations

from mutant import Mutant

CREATE_GRAPH, SPLIT = "test_create_graph.py", "test_split.py"
LAYERS, PLAIN = "test_called_layers.py", "test_plain_layers.py"

MUTANTS = (
    # ---- derivatives ---------------------------------------------------------------------------------------------------------
    Mutant(
        "inputs-without-aliases",
        "gcnet_ext/ops/_autograd.py",
        "aliases = [«tensor.view_as(tensor) if need else tensor» for",
        "tensor",
        "A way from one input to another is gone twice.",
        (CREATE_GRAPH,),
    ),
    Mutant(
        "nothing-to-differentiate",
        "gcnet_ext/ops/_autograd.py",
        "            if «out.requires_grad»\n",
        "True",
        "A parameter of a norm that is off, alone, is an error with create_graph.",
        (CREATE_GRAPH,),
    ),
    Mutant(
        "gradient-of-the-mask-bias-rounded",
        "gcnet_ext/ops/_autograd.py",
        "return None if bias is None else «bias.detach()»",
        "bias",
        "What rounding leaves of the gradient of the mask's bias is no zero.",
        (CREATE_GRAPH, SPLIT),
    ),
    Mutant(
        "backward-operators-differentiated",
        "gcnet_ext/ops/_dispatch.py",
        "    «_checks.not_differentiated(name, args)»\n",
        "pass",
        "An operator of the backward pass is differentiated, and a part of the result is missing.",
        (CREATE_GRAPH,),
    ),
    Mutant(
        "products-under-autocast",
        "gcnet_ext/ops/_precision.py",
        "        with «_without_autocast(a)»:\n            return a @ b\n\n    @staticmethod",
        "contextlib.nullcontext()",
        "The products of plain PyTorch are cast where autocast is on.",
        (CREATE_GRAPH,),
    ),
    Mutant(
        "gradients-of-products-under-autocast",
        "gcnet_ext/ops/_precision.py",
        "return «_Product.apply(grad, b.mT)» if need_a",
        "grad @ b.mT",
        "The gradient of a product is cast where autocast is on.",
        (CREATE_GRAPH,),
    ),
    Mutant(
        "tangent-of-one-factor",
        "gcnet_ext/ops/_precision.py",
        "return «_Product.apply(tangent_a, b) + _Product.apply(a, tangent_b)»",
        "_Product.apply(tangent_a, b)",
        "Forward mode forgets the second factor of a product.",
        (CREATE_GRAPH,),
    ),
    Mutant(
        "gradient-of-a-total-of-one-process",
        "gcnet_ext/ops/_split_pool.py",
        "return «_Total.apply(grad, ctx.group)», None",
        "grad",
        "The second derivatives of a context over processes lack those of the other processes.",
        (SPLIT,),
    ),
    Mutant(
        "rank-in-the-world",
        "gcnet_ext/ops/_split_pool.py",
        "ctx.share = shares[«dist.get_rank(group)»]",
        "dist.get_rank() % len(shares)",
        "A process takes another's share in a group that numbers the processes anew.",
        (SPLIT,),
    ),
    # ---- layers --------------------------------------------------------------------------------------------------------------
    Mutant(
        "methods-of-the-module",
        "gcnet_ext/blocks/_layers.py",
        "is not method or «name in module.__dict__»:",
        "False",
        "A method that is set on a layer, borrowed from another one, is not called.",
        (PLAIN,),
    ),
    Mutant(
        "methods-of-the-class",
        "gcnet_ext/blocks/_layers.py",
        "        if «getattr(cls, name) is not method» or name",
        "False",
        "torch.compile does not notice that a class is patched after compiling.",
        (PLAIN,),
    ),
    Mutant(
        "own-call",
        "gcnet_ext/blocks/_layers.py",
        "if «cls.__call__ is not nn.Module.__call__» or",
        "False",
        "A subclass with a call of its own is taken for the plain layer.",
        (PLAIN,),
    ),
    Mutant(
        "fields-of-used-layers",
        "gcnet_ext/blocks/_fused.py",
        "            «sizes += own, len(own)»  #",
        "pass",
        "What is set on a layer after the first call of its block is not noticed.",
        (PLAIN,),
    ),
    Mutant(
        "weights-in-the-place-of-parameters",
        "gcnet_ext/blocks/_fused.py",
        "name not in module._parameters or «name in module.__dict__» or",
        "False",
        "A block that was used reads a parameter that another tensor has taken the place of.",
        (PLAIN,),
    ),
    Mutant(
        "dtype-of-the-first-parameter",
        "gcnet_ext/blocks/_layers.py",
        "            dtype = «torch.promote_types(dtype, parameter.dtype)»\n",
        "parameter.dtype",
        "A called layer gets its input in the dtype of a parameter, which may be stored in fewer bits.",
        (LAYERS,),
    ),
    Mutant(
        "context-that-is-overwritten",
        "gcnet_ext/blocks/_layers.py",
        "return context[:, :, None, None]«.clone()»\n",
        "",
        "A branch that begins in place overwrites the context that autograd has saved.",
        (LAYERS,),
    ),
    Mutant(
        "context-that-both-overwrite",
        "gcnet_ext/blocks/global_context.py",
        "_layers.call_on_context(add, context«.clone()», x)",
        "",
        "A second branch that begins in place overwrites what the first has saved.",
        (LAYERS,),
    ),
    Mutant(
        "rank-of-a-wrapped-mask",
        "gcnet_ext/blocks/_layers.py",
        "if parameter.dim() in (4, 5)), None) «== 4»\n",
        "is not None",
        "A mask that sees the neighbours in a volume gets its positions in a column.",
        (LAYERS,),
    ),
)
