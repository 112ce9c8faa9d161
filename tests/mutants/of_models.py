"""Mistakes in what changes models."""

from __future__ import annotations

from mutant import Mutant

REPLACE = "test_replace.py"
INSERT = "test_insert.py"
TUNING = "test_tuning.py"
RESIDUAL = "test_residual.py"
VALID = "test_valid.py"
ACTIVATED = "test_activations.py"
KEEPS = "test_replace_keeps.py"
REPORT = "test_replace_report.py"
LATER = "test_replace_later.py"
LOOK_ALIKES = "test_replace_look_alikes.py"
TRIES = "test_replace_tries.py"
TAIL = "test_tail.py"

MUTANTS = (
    Mutant(
        "replaced-hard-sigmoid-of-onnx",
        "gcnet_ext/models/skeleton.py",
        'if kind is nn.Hardsigmoid:\n        return Gate("hard_sigmoid", «1 / 6», 0.5)',
        "0.2",
        "A replaced hard sigmoid has the slope of ONNX.",
        (REPLACE,),
    ),
    Mutant(
        "replaced-subclass",
        "gcnet_ext/models/skeleton.py",
        "return reader, «type(module) is kind» and is_original(kind)",
        "True",
        "A subclass of a peer's block, which may do otherwise, is replaced without a trial.",
        (REPORT, TRIES),
    ),
    Mutant(
        "replaced-untried-in-training",
        "gcnet_ext/models/same.py",
        "for training in («False, True»):",
        "False, False",
        "A block that does something else in training is replaced.",
        (REPORT, TRIES),
    ),
    Mutant(
        "replaced-tried-with-zeros",
        "gcnet_ext/models/same.py",
        "tensor.«normal_(0, 0.5, generator=generator)»",
        "zero_()",
        "A block with a buffer that happens to be zero is replaced.",
        (REPORT, TRIES),
    ),
    Mutant(
        "replaced-settings-forgotten",
        "gcnet_ext/models/peer.py",
        "return () if self._record is None else tuple(«self._record.fields»)",
        "()",
        "A replaced block that has run does not notice a setting that changes.",
        (REPORT, TRIES),
    ),
    Mutant(
        "replaced-leftovers",
        "gcnet_ext/models/peer.py",
        'for idle in «skeleton.idle»:\n        if not does_nothing_else(idle):\n            return f"its {_described(idle)} {',
        "()",
        "A look-alike with one submodule more is replaced.",
        (REPORT, TRIES),
    ),
    Mutant(
        "replaced-idle-modules-unseen",
        "gcnet_ext/models/peer.py",
        "found._replace(modules=tuple(«skeleton.modules()»))",
        "found.modules",
        "A replaced block that has run does not call a hook on its dropout of nothing.",
        (LATER,),
    ),
    Mutant(
        "replaced-any-rank",
        "gcnet_ext/models/peer.py",
        "record is not None« and x.dim() == 2 + record.dims» and self._has_dtype_of",
        "",
        "A replaced block takes inputs of another rank in its own way.",
        (KEEPS,),
    ),
    Mutant(
        "replaced-any-dtype",
        "gcnet_ext/models/peer.py",
        "record.dims« and self._has_dtype_of(x, record.first)»",
        "",
        "A replaced block takes an input of another dtype than its layers.",
        (KEEPS,),
    ),
    Mutant(
        "replaced-probed-with-hooks",
        "gcnet_ext/models/same.py",
        "with «_without_hooks(block)»:\n",
        "contextlib.nullcontext()",
        "replace_blocks calls the user's hooks with a probe.",
        (KEEPS,),
    ),
    Mutant(
        "replaced-gradients-untried",
        "gcnet_ext/models/same.py",
        "tensors = [(self.out, other.out)«, *zip(self.gradients, other.gradients, strict=True)»]",
        "",
        "A look-alike that stops gradients is replaced.",
        (LOOK_ALIKES,),
    ),
    Mutant(
        "replaced-class-unwatched",
        "gcnet_ext/blocks/_fused.py",
        "self.version = «class_version(type(block)) if block._watched else None»",
        "None",
        "A replaced block that has run does not notice that a method of its class is exchanged.",
        (LOOK_ALIKES,),
    ),
    Mutant(
        "replaced-tried-on-itself",
        "gcnet_ext/models/same.py",
        "if «any(id(part) in own for part in (*copied.modules(), *_tensors(copied)))»:",
        "False",
        "The weights of a block whose copy is the block itself become random.",
        (LOOK_ALIKES,),
    ),
    Mutant(
        "inserted-channels-of-the-second-norm",
        "gcnet_ext/models/insert.py",
        'LAST_LAYERS = («("conv3", "bn3"), ("conv2", "bn2")»)',
        '("conv2", "bn2"), ("conv3", "bn3")',
        "In a Bottleneck the block has the channels of the second convolution.",
        (INSERT,),
    ),
    Mutant(
        "inserted-before-drop-path",
        "gcnet_ext/models/residual_timm.py",
        "        «out = self.context_block(self._to_the_block(x))\n        if self.drop_path is not None:\n"
        "            out = self.drop_path(out)»\n"
        "        out += x if self.downsample is None else self.downsample(x)\n        return self.act2(out)",
        "out = self._to_the_block(x)\n        if self.drop_path is not None:\n            out = self.drop_path(out)\n"
        "        out = self.context_block(out)",
        "The context block sees what stochastic depth has left of the branch.",
        (INSERT,),
    ),
    Mutant(
        "inserted-in-float32",
        "gcnet_ext/models/insert.py",
        '{"device": parameter.device«, "dtype": parameter.dtype»}',
        "",
        "A block is put into a float64 model in float32.",
        (INSERT,),
    ),
    Mutant(
        "inserted-in-training-mode",
        "gcnet_ext/models/insert.py",
        "return block«.train(module.training)»",
        "",
        "A block is put into a model in eval mode in training mode.",
        (INSERT,),
    ),
    Mutant(
        "inserted-and-forgotten",
        "gcnet_ext/models/insert.py",
        "model.register_forward_hook(«_Watch({block: found[name] for block, name in zip(names, blocks, strict=True)})»)",
        "lambda *_: None",
        "Nobody says that an inserted block is not called.",
        (INSERT,),
    ),
    Mutant(
        "tuning-not-carried",
        "gcnet_ext/ops/_dispatch.py",
        "    «with _tuning.cuda_tuning(tuning):\n        return below_autograd(name, args)»\n\n\ndef _explain",
        "return below_autograd(name, args)",
        "A backward pass follows the decisions of the thread that runs it.",
        (TUNING,),
    ),
    Mutant(
        "tuning-for-ever",
        "gcnet_ext/_tuning.py",
        "    finally:\n        «_tell(before)»",
        "pass",
        "The decisions of a thread stay after the block of code that they are for.",
        (TUNING,),
    ),
    Mutant(
        "residual-kept",
        "gcnet_ext/ops/global_context.py",
        "ctx.save_for_backward(*others, «None», valid",
        "_residual",
        "A residual is kept for backward, which does not need it.",
        (RESIDUAL,),
    ),
    Mutant(
        "final-relu-not-decisive",
        "gcnet_ext/blocks/_fused.py",
        'return ("gate", "process_group", "inplace"«, "final_activation"»)',
        "",
        "A block that has been called does not notice that its final activation was changed.",
        (RESIDUAL,),
    ),
    Mutant(
        "second-derivative-past-the-relu",
        "gcnet_ext/ops/_autograd.py",
        "return «grad.where(_relu_bits.unpack(positive, x), 0) if final_activation else grad»",
        "grad",
        "With create_graph=True the gradient does not go through the final ReLU.",
        (RESIDUAL,),
    ),
    Mutant(
        "called-without-the-residual",
        "gcnet_ext/blocks/squeeze_excitation.py",
        "x, scale, residual=«residual», final_activation",
        "None",
        "A block with a hooked layer forgets the residual.",
        (RESIDUAL,),
    ),
    Mutant(
        "reference-multiplies-with-zero",
        "gcnet_ext/ops/attention_pool.py",
        "return positions if valid is None else «positions.where(valid.unsqueeze(1), 0)»",
        "positions * valid.unsqueeze(1)",
        "In plain PyTorch a NaN where a position does not count reaches the context.",
        (VALID,),
    ),
    Mutant(
        "slope-not-passed",
        "gcnet_ext/blocks/_layers.py",
        'return "leaky_relu", «module.negative_slope»',
        "Options().slope",
        "Every LeakyReLU has the default slope.",
        (ACTIVATED,),
    ),
    # ---- tails of residual blocks --------------------------------------------------------------------------------------------
    Mutant(
        "tail-past-a-hook",
        "gcnet_ext/models/tail.py",
        "if block is None or not can_take_tail(block)« or not is_untouched(block)»:",
        "",
        "A hook of the last block is not called.",
        (TAIL,),
    ),
    Mutant(
        "tail-of-any-activation",
        "gcnet_ext/models/tail.py",
        "plain = «is_relu(named.get(self._activation)) and »drops_nothing",
        "",
        "What stands in the place of the ReLU is not called.",
        (TAIL,),
    ),
    Mutant(
        "tail-of-a-final-relu",
        "gcnet_ext/blocks/_fused.py",
        'return «self.final_activation == "none"»',
        "True",
        "A block that ends with a ReLU of its own loses it before the addition.",
        (TAIL,),
    ),
    Mutant(
        "tail-overwrites-what-was-kept",
        "gcnet_ext/models/tail.py",
        "return out is not x and out is not shortcut« and has_new_output(layers)» and has_kernels(out)",
        "",
        "What a norm of somebody's own has kept is overwritten.",
        (TAIL,),
    ),
    Mutant(
        "tail-overwrites-under-a-mode",
        "gcnet_ext/models/tail.py",
        "if torch.is_grad_enabled() or is_compiling()« or modes_are_active()»:",
        "",
        "What a mode of torch has kept is overwritten.",
        (TAIL,),
    ),
    Mutant(
        "tail-never-overwrites",
        "gcnet_ext/models/tail.py",
        "if «torch.is_grad_enabled()» or is_compiling() or",
        "True",
        "Inference takes more memory than it needs.",
        (TAIL,),
    ),
    Mutant(
        "tail-of-a-shortcut-that-is-broadcast",
        "gcnet_ext/models/tail.py",
        "if «out.shape == shortcut.shape and out.dtype == shortcut.dtype»:",
        "True",
        "A shortcut that torch would broadcast is an error.",
        (TAIL,),
    ),
    Mutant(
        "captured-graph-keeps-what-nobody-reads",
        "gcnet_ext/ops/global_context.py",
        "return torch.ops.gcnet_ext.«global_context_inference.default(*args)»",
        "global_context.default(*args)[0]",
        "A captured graph computes what only a backward pass reads.",
        ("test_export.py",),
    ),
)
