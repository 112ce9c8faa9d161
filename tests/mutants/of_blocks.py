"""Mistakes in the blocks."""

from __future__ import annotations

from mutant import Mutant

MODULE = "test_global_context_block.py"
SUBMODULES = "test_submodules.py"
REPLACE = "test_replace.py"
HOOKS = "test_hooks.py"
NON_LOCAL = "test_non_local.py"
ATTENTION = "test_attention.py"
FUZZ_MODULES = "test_fuzz_modules.py"
SQUEEZE = "test_squeeze_excitation.py"

MUTANTS = (
    Mutant(
        "hook-not-looked-at",
        "gcnet_ext/_torch.py",
        '"_backward_hooks"«, "_backward_pre_hooks"»)',
        "",
        "A full backward pre-hook of a submodule is not called.",
        (HOOKS,),
    ),
    Mutant(
        "hook-of-all-modules",
        "gcnet_ext/blocks/_layers.py",
        "past_global_hooks and «any(getattr(torch.nn.modules.module, name) for name in GLOBAL_HOOKS)»",
        "False",
        "torch's global hooks are not called for the submodules of a block.",
        (HOOKS,),
    ),
    Mutant(
        "grouped-convolution",
        "gcnet_ext/blocks/_layers.py",
        "and «module.groups == 1»",
        "True",
        "A grouped convolution is taken for a plain one.",
        (SUBMODULES,),
    ),
    Mutant(
        "count-of-zero",
        "gcnet_ext/blocks/_layers.py",
        "if value < «1»:",
        "0",
        "A block of no channels can be made.",
        (FUZZ_MODULES,),
    ),
    Mutant(
        "branches-that-differ",
        "gcnet_ext/blocks/_fused.py",
        "if «any(branch.between != between for branch in given)»:",
        "False",
        "Both branches have the norm and the activation of the first.",
        (SUBMODULES,),
    ),
    Mutant(
        "stride-set-later",
        "gcnet_ext/blocks/_layers.py",
        '(CONVOLUTIONS.values(), ("kernel_size", «"stride", »"padding", "groups")),',
        "",
        "A stride that is set after the first call is not noticed.",
        (SUBMODULES,),
    ),
    Mutant(
        "replica-taken-for-the-block",
        "gcnet_ext/blocks/_fused.py",
        "if «self.block is not block.__dict__»:",
        "False",
        "A replica of a used block computes with the parameters of the original.",
        (SUBMODULES,),
    ),
    Mutant(
        "timm-name-misspelt",
        "gcnet_ext/blocks/_state_dict.py",
        '"«conv_attn»": "conv_mask",',
        "conv_att",
        "timm's checkpoints do not load.",
        (REPLACE,),
    ),
    Mutant(
        "timm-branches-swapped",
        "gcnet_ext/blocks/_state_dict.py",
        '(«("add", "add"), ("scale", "mul")»)',
        '("add", "mul"), ("scale", "add")',
        "timm's branches load into each other.",
        (REPLACE,),
    ),
    Mutant(
        "checkpoint-of-another-shape",
        "gcnet_ext/blocks/_state_dict.py",
        "«_without_ones(value.shape) == _without_ones(target.shape)»",
        "value.numel() == target.numel()",
        "A weight of another shape with as many elements loads without an error.",
        (REPLACE,),
    ),
    Mutant(
        "mask-fan-out",
        "gcnet_ext/blocks/global_context.py",
        'mode="«fan_in»"',
        "fan_out",
        "The mask starts with weights as large as those of a layer with one input.",
        (MODULE,),
    ),
    Mutant(
        "norm-without-eps",
        "gcnet_ext/blocks/global_context.py",
        "nn.LayerNorm([planes, 1, 1]«, eps=eps», **factory)",
        "",
        "The block's epsilon is ignored.",
        (MODULE,),
    ),
    Mutant(
        "mask-on-the-cpu",
        "gcnet_ext/blocks/global_context.py",
        "self.conv_mask = nn.Conv2d(inplanes, 1, 1«, **factory») if",
        "",
        "The mask is made on the CPU and in float32, whatever the caller said.",
        (MODULE,),
    ),
    Mutant(
        "map-with-a-graph",
        "gcnet_ext/blocks/global_context.py",
        "_layers.called_attention(self.conv_mask, x, valid)«.detach()».reshape",
        "",
        "A map of the attention of a mask that is called drags its graph along.",
        (SUBMODULES,),
    ),
    Mutant(
        "bias-all-the-same",
        "gcnet_ext/blocks/squeeze_excitation.py",
        "self.fc2 = nn.Conv2d(self.planes, inplanes, 1, bias=«bias»,",
        "True",
        "The second layer has a bias although none was asked for.",
        (SQUEEZE, REPLACE),
    ),
    Mutant(
        "non-local-scale",
        "gcnet_ext/blocks/non_local.py",
        "scale = «theta.shape[1]» ** -0.5",
        "theta.shape[2]",
        "The logits are divided by the root of the positions, not of the channels.",
        (NON_LOCAL, REPLACE),
    ),
    Mutant(
        "non-local-video",
        "gcnet_ext/blocks/non_local.py",
        "3: (F.max_pool3d, «(1, 2, 2)»)}",
        "2",
        "A video is sub-sampled along time, too.",
        (NON_LOCAL, REPLACE),
    ),
    Mutant(
        "attention-of-the-last-block",
        "gcnet_ext/blocks/_attention.py",
        "dphi.«baddbmm_(theta[:, :, p], ds)»",
        "copy_(torch.bmm(theta[:, :, p], ds))",
        "The gradient of the keys is that of the last block of weights alone.",
        (ATTENTION,),
    ),
    Mutant(
        "attention-without-the-sum-of-its-softmax",
        "gcnet_ext/blocks/_attention.py",
        "ds«.sub_((y[:, :, p] * dy_part).sum(1).unsqueeze(2))».mul_(w)",
        "",
        "The gradient of the softmax lacks its second term.",
        (ATTENTION,),
    ),
)
