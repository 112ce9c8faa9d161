"""NonLocalBlock against the block with all pairs of positions, in float64 and with random parameters."""

from __future__ import annotations

import eager
import grid
import pytest
import torch
from grid import Random
from test_global_context_block import gradcheck_module
from torch.utils._python_dispatch import TorchDispatchMode

from gcnet_ext import NonLocalBlock
from gcnet_ext.blocks.non_local import MODES


def pair(channels: int = 8, **options):
    truth = eager.randomise(eager.NonLocal(channels, **options))
    block = NonLocalBlock(channels, **options)
    state = {f"{name.rpartition('.')[0]}.conv.{name.rpartition('.')[2]}": tensor for name, tensor in truth.state_dict().items()}
    block.load_state_dict(state, strict=True)
    return block, truth.double()


def check(block: NonLocalBlock, truth: eager.NonLocal, x: torch.Tensor) -> None:
    """Output, gradient of x and of every parameter; a float64 block for a float64 x, a float32 one otherwise."""
    block = block.double() if x.dtype == torch.float64 else block
    ours, theirs = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    out, want = block(ours), truth(theirs)
    grad = Random(9).feature_map(tuple(x.shape), x.dtype)
    out.backward(grad)
    want.backward(grad.double())
    assert out.dtype == ours.grad.dtype == x.dtype
    found = {name.replace(".conv.", "."): parameter.grad for name, parameter in block.named_parameters()}
    expected = {name: parameter.grad for name, parameter in truth.named_parameters()}
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    rounding = {torch.float64: 1e-12, torch.float32: 2e-5}[next(block.parameters()).dtype]
    stored = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(x.dtype, 0) + rounding
    for name, got, right, tolerance in (
        ("out", out, want, stored),
        ("gradient of x", ours.grad, theirs.grad, stored),
        *((name, found[name], expected[name], rounding) for name in found),
    ):
        # In the softmax modes the biases of phi, and of theta where there is one key, change nothing: their gradients vanish.
        scale = max(float(right.detach().abs().max()), 1.0 if name in ("out", "gradient of x") else 1e-3 * largest)
        error = float((got.double() - right).detach().abs().max()) / scale
        assert error <= 20 * tolerance, f"{name}: {error}"


SPATIAL = [(20,), (6, 4), (3, 4, 6)]


@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, sub_sample, spatial):
    check(*pair(mode=mode, sub_sample=sub_sample), Random(1).feature_map((2, 8, *spatial), torch.float64))


@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes_and_layouts(mode, dtype, layout):
    """float32 parameters, as in mixed precision."""
    check(*pair(mode=mode), Random(1).feature_map((2, 8, 5, 6), dtype, layout))


@pytest.mark.parametrize(("channels", "reduction"), [(1, 2), (2, 1), (5, 2), (64, 4)])
@pytest.mark.parametrize("positions", [1, 3, 49])
@pytest.mark.parametrize("mode", MODES)
def test_sizes(mode, positions, channels, reduction):
    check(*pair(channels, mode=mode, reduction=reduction), Random(1).feature_map((2, channels, positions), torch.float64))


@pytest.mark.parametrize("use_scale", [False, True])
def test_use_scale(use_scale):
    check(*pair(use_scale=use_scale), Random(1).feature_map((2, 8, 5, 6), torch.float32))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    block = pair(4, mode=mode)[0].double()
    assert gradcheck_module(block, Random(1).feature_map((2, 4, 5), torch.float64).requires_grad_())


@pytest.mark.parametrize("mode", MODES)
def test_no_matrix_of_pairs(mode):
    """No tensor of P x P elements is ever made, forward or backward."""
    positions = 1024
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            result = op(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    block = pair(8, mode=mode)[0]
    x = Random(1).feature_map((1, 8, positions), torch.float32).requires_grad_()
    with Watch():
        block(x).sum().backward()
    assert 8 * positions <= largest < positions**2 // 8


@pytest.mark.parametrize("mode", MODES)
def test_names_shapes_and_identity(mode):
    block = NonLocalBlock(8, mode=mode)
    shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    layers = {"g": (4, 8), "conv_out": (8, 4)} | ({} if mode == "gaussian" else {"theta": (4, 8), "phi": (4, 8)})
    expected = {f"{name}.conv.weight": (*sizes, 1, 1) for name, sizes in layers.items()}
    expected |= {f"{name}.conv.bias": sizes[:1] for name, sizes in layers.items()}
    if mode == "concatenation":
        expected["concat_project.conv.weight"] = (1, 8, 1, 1)
    assert shapes == expected
    x = Random(1).feature_map((2, 8, 5, 6), torch.float32)
    assert torch.equal(block(x), x)


def test_batch_norm():
    """Running statistics in training, and the block starts as the identity: the norm's weight is zero."""
    block = NonLocalBlock(8, norm="batch")
    assert block.conv_out.conv.bias is None
    x = Random(1).feature_map((2, 8, 5, 6), torch.float32)
    assert torch.equal(block(x), x)
    assert block.conv_out.bn.num_batches_tracked == 1
    eager.randomise(block)
    with torch.no_grad():
        block.conv_out.bn.weight.fill_(1.0)
        block.conv_out.bn.bias.zero_()
    added = (block(x) - x).flatten(2)
    assert torch.allclose(added.mean((0, 2)), torch.zeros(8), atol=1e-5)
    assert torch.allclose(added.var((0, 2), unbiased=False), torch.ones(8), atol=2e-2)
    block.eval()
    assert torch.allclose(block(x[:1]), block(x)[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "cosine"}, "mode must be one of .*'gaussian'.* got 'cosine'"),
        ({"norm": "layer"}, "norm must be one of .*'batch'.* got 'layer'"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(8, **options)


def test_wrong_input():
    with pytest.raises(RuntimeError, match=r"x must have 8 channels \(inplanes\), got shape \[2, 4, 4, 4\]"):
        NonLocalBlock(8)(torch.ones(2, 4, 4, 4))
    for sizes in ((2, 8), (2, 8, 1, 1, 1, 1)):
        with pytest.raises(RuntimeError, match="x must have 1 to 3 spatial dimensions"):
            NonLocalBlock(8)(torch.ones(sizes))


@pytest.mark.parametrize("when", ["its own", "of all modules"])
def test_a_hooked_projection_is_called(when):
    """Where somebody looks at concat_project, it is called on all pairs of positions, as in eager; without hooks it is not."""
    block = eager.randomise(NonLocalBlock(6, mode="concatenation", dtype=torch.float64))
    x, seen = torch.randn(2, 6, 3, 4, dtype=torch.float64), []
    want = block(x)

    def look(module, given, out):
        if module is block.concat_project.conv:
            seen.append((given[0].shape, out.shape))

    if when == "its own":
        handle = block.concat_project.conv.register_forward_hook(look)
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        out = block(x)
    finally:
        handle.remove()
    assert seen == [((2, 6, 12, 12), (2, 1, 12, 12))]
    assert torch.allclose(out, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(block(x), want)
    assert len(seen) == 1
