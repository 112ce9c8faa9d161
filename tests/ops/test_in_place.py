"""inplace=True: x is overwritten with the result, the same bits as out of place; never where autograd would need it."""

from __future__ import annotations

import copy

import grid
import pytest
import reference
import torch
from allocations import BUFFERS, SHAPE, allocated
from grid import Case, Random

import gcnet_ext
from gcnet_ext import GlobalContextBlock, SimplifiedNonLocalBlock, SqueezeExcitation

OWN_MEMORY = tuple(layout for layout in grid.EVERY_LAYOUT if not layout.startswith("expanded"))
SHARED = tuple(layout for layout in grid.EVERY_LAYOUT if layout.startswith("expanded"))
BLOCKS = {
    "global context": lambda: GlobalContextBlock(10, 0.5, fusion_types=("channel_mul", "channel_add"), inplace=True),
    "average": lambda: GlobalContextBlock(10, 0.5, "avg", "channel_add", inplace=True),
    "squeeze-excitation": lambda: SqueezeExcitation(10, 0.5, inplace=True),
    "simplified non-local": lambda: SimplifiedNonLocalBlock(10, inplace=True),
}


def randomised(block: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def run(backend, op: str, inputs, **options):
    if op == "global_context":
        return grid.flat(backend.global_context, **options)(*inputs)
    scale, shift = (Random(7 + i, backend.to).normal(*inputs[0].shape[:2], dtype=inputs[0].dtype) for i in (0, 1))
    return backend.channel_fuse(inputs[0], scale, shift, **options)


@pytest.mark.parametrize("op", ["global_context", "channel_fuse"])
@pytest.mark.parametrize("layout", OWN_MEMORY)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
def test_same_bits(backend, op, layout, dtype):
    case = Case((3, 10, 6, 7), dtype, layout)
    want = run(backend, op, case.inputs(backend.to))
    inputs = case.inputs(backend.to)
    got = run(backend, op, inputs, inplace=True)
    assert got is inputs[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("op", ["global_context", "channel_fuse"])
@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_large_samples(cpu, op, layout):
    """More than a tile, a split and a group."""
    case = Case((2, 64, 150, 130), layout=layout)
    inputs = case.inputs()
    want = run(cpu, op, inputs)
    assert torch.equal(run(cpu, op, inputs, inplace=True), want)


@pytest.mark.parametrize("op", ["global_context", "channel_fuse"])
@pytest.mark.parametrize("layout", SHARED)
def test_elements_that_share_memory(backend, op, layout):
    inputs = Case((3, 10, 6, 7), layout=layout).inputs(backend.to)
    with pytest.raises(RuntimeError, match=r"x must not have elements that share memory when it is overwritten, got shape"):
        run(backend, op, inputs, inplace=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_elements_that_overlap(kernels, device):
    x = torch.ones(100, device=device).as_strided((2, 3, 4), (12, 3, 1))
    with pytest.raises(RuntimeError, match=r"got shape \[2, 3, 4\] with strides \[12, 3, 1\]"):
        gcnet_ext.channel_fuse(x, torch.ones(2, 3, device=device), inplace=True)


@pytest.mark.parametrize("needing", ["x", "weight"])
def test_autograd_would_need_it(backend, needing):
    inputs = list(Case((2, 10, 4, 5)).inputs(backend.to))
    index = 0 if needing == "x" else 3
    inputs[index] = inputs[index].requires_grad_()
    before = inputs[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"x must not be overwritten \(inplace=True\) where autograd needs it"):
        run(backend, "global_context", inputs, inplace=True)
    assert torch.equal(inputs[0], before)
    with torch.no_grad():
        run(backend, "global_context", inputs, inplace=True)


def test_raw_operators_refuse_it_too(kernels):
    x = torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="x must not be overwritten"):
        torch.ops.gcnet_ext.channel_fuse_(x * 1, torch.ones(2, 3), None, None, 0)


def test_a_graph_that_saved_x_notices(backend):
    """As with every in-place operator of torch: no silently wrong gradient."""
    leaf = backend.to(torch.randn(2, 3, 4, 5)).requires_grad_()
    x = leaf.exp()  # saves its result
    with torch.no_grad():
        backend.channel_fuse(x, torch.full((2, 3), 2.0, device=x.device), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def overwrite_by_functions(backend, x):
    """In place, by a function and with an x that nothing asks a gradient of."""
    inputs = Case(tuple(x.shape)).inputs(backend.to)
    yield lambda: run(backend, "channel_fuse", (x,), inplace=True)
    yield lambda: run(backend, "global_context", (x, *inputs[1:]), inplace=True)


def overwrite_by_operators(backend, x):
    inputs = Case(tuple(x.shape)).inputs(backend.to)
    yield lambda: backend.ops.channel_fuse_(x, torch.full(x.shape[:2], 2.0, device=x.device), None)
    yield lambda: backend.ops.global_context_(x, *inputs[1:])


def overwrite_by_blocks(backend, x):
    for make in BLOCKS.values():
        block = randomised(make()).to(backend.device).requires_grad_(False)
        yield lambda block=block: block(x)


@pytest.mark.parametrize("graded", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("part", ["all of x", "a view of x"])
@pytest.mark.parametrize("overwrite", [overwrite_by_functions, overwrite_by_operators, overwrite_by_blocks])
def test_a_graph_that_saved_an_x_without_gradient_notices(backend, kernels, overwrite, part, graded):
    """The gradient of a factor is the x that it was multiplied with, which must be the one of before."""
    x = backend.to(torch.randn(2, 10, 4, 6))
    written = x if part == "all of x" else x[..., 1:-1]
    for write in overwrite(backend, written):
        factor = torch.ones_like(x).requires_grad_()
        product = x * factor
        before = x.clone()
        with graded():
            write()
        assert not torch.equal(x, before)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(backend, name, mode):
    block = randomised(BLOCKS[name]()).to(backend.device)
    other = copy.deepcopy(block)
    other.inplace = False
    with mode():
        x = backend.to(torch.randn(2, 10, 4, 5))
        want = other(x)
        assert block(x) is x
        assert torch.equal(x, want)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_with_a_replaced_submodule(cpu, name):
    """The compiled pooling and fusion around a module that is called."""
    block = randomised(BLOCKS[name]())
    for module in list(block.modules()):
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_: None)
    other = copy.deepcopy(block)
    other.inplace = False
    x = torch.randn(2, 10, 4, 5)
    with torch.no_grad():
        want = other(x)
        assert block(x) is x
    assert torch.equal(x, want)


def test_training_with_it_is_an_error():
    block = BLOCKS["global context"]()
    with pytest.raises(RuntimeError, match="or inplace=False to train"):
        block(torch.randn(2, 10, 4, 5))


@pytest.mark.parametrize("op", ["global_context", "channel_fuse"])
@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_allocates_no_output(cpu, op, layout):
    inputs = Case(SHAPE, layout=layout).inputs()
    most, _ = allocated(lambda: run(cpu, op, inputs, inplace=True))
    assert most <= BUFFERS


def test_meta(kernels):
    x = torch.empty(2, 3, 4, 5, device="meta")
    assert gcnet_ext.channel_fuse(x, torch.empty(2, 3, device="meta"), inplace=True) is x


def test_plain_pytorch(monkeypatch):
    """Where there are no kernels."""
    monkeypatch.setattr(gcnet_ext.ops._dispatch, "way_of", lambda *_: gcnet_ext.ops._dispatch.PLAIN)
    inputs = list(Case((2, 10, 4, 5)).inputs())
    want = grid.flat(reference.global_context)(*inputs)
    got = grid.flat(gcnet_ext.global_context, inplace=True)(*inputs)
    assert got is inputs[0]
    assert torch.equal(got, want)
    leaf = torch.randn(2, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="x must not be overwritten"):
        gcnet_ext.channel_fuse(leaf, inplace=True)
    inputs[3] = inputs[3].requires_grad_()  # a weight
    with pytest.raises(RuntimeError, match="x must not be overwritten"):
        grid.flat(gcnet_ext.global_context, inplace=True)(*inputs)


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled(kernels, name):
    torch._dynamo.reset()
    block = randomised(BLOCKS[name]())
    other = copy.deepcopy(block)
    other.inplace = False

    def around(x: torch.Tensor) -> torch.Tensor:
        return block(x * 2) + 1

    x = torch.randn(2, 10, 4, 5)
    with torch.no_grad():
        got, want = torch.compile(around, fullgraph=True)(x), other(x * 2) + 1
    assert torch.allclose(got, want)
