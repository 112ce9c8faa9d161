"""What the fusion adds and does last: out = act(x * scale + shift + residual), in every way that it is called."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import grid
import pytest
import reference
import torch
from grid import Case, Random
from small_blocks import BLOCKS, randomised
from torch import Tensor, nn

import gcnet_ext
from gcnet_ext import GlobalContextBlock
from gcnet_ext.ops import _relu_bits

SHAPES = ((3, 20, 7, 7), (2, 64, 49), (1, 7, 33, 9), (2, 5, 1, 1), (2, 3, 2, 3, 5))
RESIDUALS = ("none", "own", "x", "another format", "cropped")
FINAL = ("none", "relu")


def residual_of(kind: str, x: Tensor, layout: str, random: Random) -> Tensor | None:
    others = {
        "own": layout,
        "another format": "channels_last" if layout == "contiguous" else "contiguous",
        "cropped": "cropped",
    }
    if kind in others:
        return random.feature_map(x.shape, x.dtype, others[kind])
    return x if kind == "x" else None


def differentiated(function, tensors: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradient of every tensor that there is; of one that is given twice, of each by itself."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad))


def assert_gradients(got: list[Tensor], want: list[Tensor], accumulated_in: torch.dtype, sums: float = 150) -> None:
    largest = max(float(tensor.abs().max()) for tensor in want)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        grid.assert_close(ours, theirs, accumulated_in, f"gradient {index}", sums=sums, largest=largest)


@pytest.mark.representative
@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_fuse(backend, shape, dtype, layout, kind, final):
    """One rounding: the float64 result to the dtype of x, with and without scale and shift, and in place."""
    random = Random(0, backend.to)
    x, grad = (random.feature_map(shape, dtype, layout) for _ in range(2))
    residual = residual_of(kind, x, layout, random)
    accumulation = reference.accumulation_dtype(x)
    for has_scale, has_shift in itertools.product((False, True), repeat=2):
        scale, shift = (random.normal(*shape[:2], dtype=accumulation) if has else None for has in (has_scale, has_shift))

        def ours(x, scale, shift, residual):
            return backend.channel_fuse(x, scale, shift, residual=residual, final_activation=final)

        def truth(x, scale, shift, residual):
            return reference.channel_fuse(x, scale, shift, residual=residual, final_activation=final)

        tensors = (x, scale, shift, residual)
        exact = [None if tensor is None else tensor.cpu().double() for tensor in tensors]
        want, gradients = differentiated(truth, exact, grad.cpu().double())
        out, found = differentiated(ours, tensors, grad)
        grid.assert_close(out, want, accumulation, "out")
        assert grid.memory_format_kept(out, x)
        assert_gradients(found, gradients, accumulation)
        overwritten = x.clone(memory_format=torch.preserve_format)
        added = overwritten if residual is x else residual
        done = backend.channel_fuse(overwritten, scale, shift, residual=added, final_activation=final, inplace=True)
        assert done is overwritten
        assert torch.equal(done, out)


@pytest.mark.representative
@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("kind", ["own", "x", "another format"])
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
def test_global_context(backend, dtype, layout, kind, final):
    for pooling, fusion in itertools.product(grid.POOLINGS, grid.FUSIONS):
        case = Case((2, 10, 7, 7), dtype, layout, pooling, fusion)
        inputs = case.inputs(backend.to)
        x = inputs[0]
        random = Random(1, backend.to)
        residual, grad = residual_of(kind, x, layout, random), random.feature_map(case.shape, dtype, layout)

        def call(module, *tensors):
            *others, residual = tensors
            return grid.flat(module.global_context, residual=residual, final_activation=final)(*others)

        tensors = (*inputs, residual)
        exact = [None if tensor is None else tensor.cpu().double() for tensor in tensors]
        want, gradients = differentiated(lambda *t: call(reference, *t), exact, grad.cpu().double())
        out, found = differentiated(lambda *t: call(backend, *t), tensors, grad)
        grid.assert_close(out, want, grid.accumulation(x), "out")
        assert_gradients(found, gradients, grid.accumulation(x), case.sums)
        with torch.no_grad():
            assert torch.equal(call(backend, *tensors), out)


@pytest.mark.representative
def test_relu_of_nan_and_zero_is_torchs(backend):
    """A NaN stays one and passes the gradient; nothing passes where the result is 0."""
    x = backend.to(torch.tensor([torch.nan, 0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-30]).reshape(1, 1, 8))
    for layout in (x, x.reshape(1, 8, 1)):
        leaf, theirs = layout.clone().requires_grad_(), layout.clone().requires_grad_()
        out = backend.channel_fuse(leaf, final_activation="relu")
        expected = theirs.relu()
        assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7))
        out.sum().backward()
        expected.sum().backward()
        assert torch.equal(leaf.grad, theirs.grad)


def test_no_product_with_the_mask(backend):
    """Where the ReLU lets nothing pass, the gradient is 0 even if what comes is infinite or NaN."""
    x = backend.to(torch.tensor([-1.0, 1.0, -1.0]).reshape(1, 1, 3)).requires_grad_()
    residual = torch.zeros_like(x).requires_grad_()
    out = backend.channel_fuse(x, residual=residual, final_activation="relu")
    grads = torch.autograd.grad(out, (x, residual), backend.to(torch.tensor([torch.nan, 2.0, torch.inf]).reshape(1, 1, 3)))
    for grad in grads:
        assert grad.flatten().tolist() == [0.0, 2.0, 0.0]


@pytest.mark.representative
@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
def test_bits_are_those_of_the_result(backend, layout):
    """Of any view: what the operator keeps is unpacked to where the result is above 0."""
    x = grid.EVERY_LAYOUT[layout](Random(0, backend.to).normal, 2, 20, 5, 9)
    out, positive = backend.ops.channel_fuse(x, final_activation=1, scale=None, shift=None)
    assert positive.shape == (2, _relu_bits.bytes_of(x))
    assert torch.equal(_relu_bits.unpack(positive, x), out > 0)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 300, 40, 41), (1, 2, 40_003)], ids=str)
def test_several_blocks_of_a_sample(cpu, kernels, shape, layout):
    """Blocks of channels, and blocks of a long row, whose bits begin within that of the row."""
    random = Random(0)
    x, residual, grad = (random.feature_map(shape, torch.float32, layout) for _ in range(3))
    scale = random.normal(*shape[:2])
    results = []
    for module in (gcnet_ext, reference):
        leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (x, scale, residual)]
        out = module.channel_fuse(*leaves[:2], residual=leaves[2], final_activation="relu")
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_residual_that_lies_in_x_with_gaps(backend):
    """Overwritten before it was read, if it were not copied first: each element is the neighbour of one of x."""
    memory = Random(0, backend.to).normal(2, 6, 40)
    x, residual = memory[..., 1:], memory[..., :-1]
    want = backend.channel_fuse(x, None, None, residual=residual.clone(), final_activation="relu")
    assert torch.equal(backend.channel_fuse(x, residual=residual, final_activation="relu", inplace=True), want)


def test_first_derivatives_that_can_be_differentiated_are_the_same(backend):
    random = Random(0, backend.to)
    x, residual = (random.feature_map((2, 10, 5, 5), torch.float64).requires_grad_() for _ in range(2))
    inputs = [t.requires_grad_() for t in Case((2, 10, 5, 5), torch.float64).inputs(backend.to)[1:]]
    for out, given in (
        (
            backend.channel_fuse(x, inputs[0].expand(2, 10), residual=residual, final_activation="relu"),
            (x, residual, inputs[0]),
        ),
        (grid.flat(backend.global_context, residual=residual, final_activation="relu")(x, *inputs), (x, residual, *inputs)),
    ):
        grad = torch.ones_like(out)
        plain = torch.autograd.grad(out, given, grad, retain_graph=True)
        again = torch.autograd.grad(out, given, grad, create_graph=True)
        for ours, theirs in zip(plain, again, strict=True):
            assert torch.allclose(ours, theirs)


def test_gradcheck(backend):
    """First and second derivatives."""
    random = Random(0, backend.to)
    x, residual = (random.feature_map((2, 3, 2, 3), torch.float64) for _ in range(2))
    scale, shift = (random.normal(2, 3, dtype=torch.float64) for _ in range(2))
    leaves = [tensor.requires_grad_() for tensor in (x, scale, shift, residual)]

    def call(x, scale, shift, residual):
        return backend.channel_fuse(x, scale, shift, residual=residual, final_activation="relu")

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    inputs = [t.requires_grad_() for t in Case((2, 3, 2, 3), torch.float64, hidden=2).inputs(backend.to)]

    def block(residual, *inputs):
        return grid.flat(backend.global_context, residual=residual, final_activation="relu")(*inputs)

    assert torch.autograd.gradcheck(block, (residual, *inputs))
    assert torch.autograd.gradgradcheck(block, (residual, *inputs))


@pytest.mark.parametrize("final", FINAL)
def test_gradients_that_are_not_needed(backend, final):
    random = Random(0, backend.to)
    x, residual, grad = (random.feature_map((2, 20, 5, 9), torch.float32) for _ in range(3))
    scale = random.normal(2, 20)

    def call(x, scale, residual):
        return backend.channel_fuse(x, scale, residual=residual, final_activation=final)

    grid_of_needs = [needs for needs in itertools.product((False, True), repeat=3) if any(needs)]
    for needs in grid_of_needs:
        grid.check_needs(call, (x, scale, residual), grad, needs)


def test_the_residual_gets_the_gradient_itself(cpu, kernels):
    """Without a ReLU the operator has nothing to compute for it."""
    x, residual = (Random(seed).feature_map((2, 8, 5, 5), torch.float32) for seed in (0, 1))
    grad = Random(2).feature_map((2, 8, 5, 5), torch.float32)
    for function in (gcnet_ext.channel_fuse, GlobalContextBlock(8, 1 / 4)):
        out = function(x, residual=residual.requires_grad_())
        (found,) = torch.autograd.grad(out, residual, grad)
        assert found.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_bits_do_not_depend_on_threads_or_batch(cpu, kernels, threads, layout):
    case = Case((5, 96, 31, 33), torch.float32, layout)
    inputs = case.inputs()
    random = Random(1)
    residual, grad = (random.feature_map(case.shape, torch.float32, layout) for _ in range(2))

    def call(n: slice):
        x, *weights = inputs

        def function(x, residual):
            return grid.flat(gcnet_ext.global_context, residual=residual, final_activation="relu")(x, *weights)

        return differentiated(function, (x[n], residual[n]), grad[n])

    threads(1)
    want, gradients = call(slice(None))
    for count in (2, 3, 7):
        threads(count)
        out, found = call(slice(None))
        assert torch.equal(out, want)
        assert all(map(torch.equal, found, gradients))
    out, found = call(slice(2, 3))
    assert torch.equal(out, want[2:3])
    assert all(torch.equal(ours, theirs[2:3]) for ours, theirs in zip(found, gradients, strict=True))


# ---- the blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True], ids=["fused", "called"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, called):
    """As the block, an addition and a ReLU; also where a layer is called because it has a hook."""
    block = randomised(BLOCKS[name](final_activation="relu"))
    plain = BLOCKS[name]()
    plain.load_state_dict(block.state_dict())
    if called:
        next(block.children()).register_forward_hook(lambda *_: None)
    x, residual = (Random(seed).feature_map((2, 16, 5, 6), torch.float64) for seed in (0, 1))
    block, plain = block.double(), plain.double()
    for _ in range(3):
        assert torch.allclose(block(x, residual), (plain(x) + residual).relu())
        assert torch.allclose(block(x), plain(x).relu())
        assert torch.allclose(plain(x, residual=residual), plain(x) + residual)
    block.final_activation = "none"
    assert torch.allclose(block(x, residual), plain(x) + residual)


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_exported_and_vmapped(name, fresh_dynamo):
    block = randomised(BLOCKS[name](final_activation="relu")).eval()
    x, residual = (Random(seed).feature_map((2, 16, 5, 6), torch.float32) for seed in (0, 1))
    valid = torch.ones(2, 5, 6, dtype=torch.bool)
    valid[0, 2:] = False
    want = block(x, residual, valid).detach()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    leaf, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = compiled(leaf, residual, valid)
    assert torch.allclose(out, want, atol=1e-6)
    out.sum().backward()
    block(own, residual, valid).sum().backward()
    assert torch.allclose(leaf.grad, own.grad, atol=1e-5)
    exported = torch.export.export(block, (x, residual, valid))
    assert torch.allclose(exported.module()(x, residual, valid), want, atol=1e-6)
    mapped = torch.func.vmap(lambda x, residual, valid: block(x[None], residual[None], valid[None])[0])
    assert torch.allclose(mapped(x, residual, valid), want, atol=1e-5)


def test_torch_fx_keeps_the_arguments():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = randomised(GlobalContextBlock(16, 1 / 4, final_activation="relu"))

        def forward(self, x: Tensor, residual: Tensor, valid: Tensor) -> Tensor:
            return self.block(x, residual, valid=valid)

    net = Net()
    x, residual = (Random(seed).feature_map((2, 16, 5, 6), torch.float32) for seed in (0, 1))
    valid = torch.rand(2, 5, 6) > 0.3
    assert torch.equal(torch.fx.symbolic_trace(net)(x, residual, valid), net(x, residual, valid))


def test_the_non_local_block_takes_neither():
    block = gcnet_ext.NonLocalBlock(16)
    x = torch.randn(1, 16, 4, 4)
    for name in ("residual", "valid"):
        with pytest.raises(TypeError, match=name):
            block(x, **{name: x})


def test_what_is_kept_for_backward(cpu, kernels):
    """x and a bit per element; not the residual, nor the result."""
    shape = (2, 64, 40, 40)
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    block = randomised(GlobalContextBlock(64, 1 / 4, final_activation="relu"))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = block(x, residual)
        fused = gcnet_ext.channel_fuse(x, torch.ones(2, 64), residual=residual, final_activation="relu")
    parameters = {parameter.data_ptr() for parameter in block.parameters()}
    bytes_of = {t.data_ptr(): t.nbytes for t in kept if t.numel() and t.data_ptr() not in parameters}
    assert {residual.data_ptr(), out.data_ptr(), fused.data_ptr()}.isdisjoint(bytes_of)
    bits = 2 * 64 * 200
    small = 2 * 1600 * 4 + 16 * 1024  # the attention; contexts, gates and hidden units
    assert sum(bytes_of.values()) <= x.nbytes + 2 * bits + small
