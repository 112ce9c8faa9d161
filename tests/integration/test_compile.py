"""torch.compile without graph breaks and with dynamic sizes, and torch.library.opcheck on every operator."""

from __future__ import annotations

import re
from collections import OrderedDict

import grid
import pytest
import reference
import schema
import torch
from calls import operator_arguments
from functorch.compile import make_boxed_compiler
from grid import Case, Random
from networks import residual
from registry import OP_OF, OPERATORS
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code

import gcnet_ext
from gcnet_ext import GlobalContextBlock, insert_blocks

SHAPES = ((2, 12, 6, 7), (3, 12, 5, 9), (4, 12, 8, 8), (2, 12, 3, 11))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_close(got: grid.Result, want: grid.Result) -> None:
    """The same kernels on the same numbers; what the compiler fuses around them may round in another way."""
    assert got.out.stride() == want.out.stride()
    assert torch.allclose(got.out, want.out, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got.grads, want.grads, strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def check(function, inputs_of, graphs: list) -> None:
    """Every shape by one graph, forward and backward."""

    def counted(module, example_inputs):
        graphs.append(module)
        return module

    by_inductor = torch.compile(function, fullgraph=True, dynamic=True)
    by_counter = torch.compile(function, fullgraph=True, dynamic=True, backend=counted)
    for shape in SHAPES:
        inputs = inputs_of(shape)
        want = grid.run(function, inputs)
        assert_close(grid.run(by_inductor, inputs), want)
        assert_close(grid.run(by_counter, inputs), want)
    assert len(graphs) == 1, "another size was another graph"


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
def test_global_context(kernels, backend, pooling, layout):
    graphs = []
    check(
        grid.flat(backend.global_context), lambda shape: Case(shape, layout=layout, pooling=pooling).inputs(backend.to), graphs
    )
    assert sum("gcnet_ext.global_context" in str(node.target) for node in graphs[0].graph.nodes) == 1


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_attention_pool_and_channel_fuse(kernels, backend, layout):
    """The building blocks, with something of the caller's between them for the compiler to fuse."""

    def function(x, weight, bias):
        context = backend.attention_pool(x, weight, bias)
        return backend.channel_fuse(x * 2, context.tanh() + 1, context.relu())

    graphs = []
    check(function, lambda shape: Case(shape, layout=layout).inputs(backend.to)[:3], graphs)
    assert sum("gcnet_ext" in str(node.target) for node in graphs[0].graph.nodes) == 2


def test_block_in_a_net(kernels, backend):
    """The module between two convolutions, in training; the gradients of all the parameters."""
    torch.manual_seed(0)
    block = GlobalContextBlock(8, 0.5, fusion_types=("channel_mul", "channel_add"))
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), block, torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1)).to(backend.device)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for size in (8, 11):
        x = Random(size, backend.to).feature_map((2, 3, size, size + 2), torch.float32)
        results = []
        for module in (net, compiled):
            net.zero_grad()
            out = module(x)
            out.square().mean().backward()
            results.append([out.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def stage_with_blocks() -> nn.Module:
    """A stage of a ResNet, with the blocks that insert_blocks puts before its additions."""
    stage = nn.Sequential(OrderedDict(layer1=nn.Sequential(residual(), residual()))).eval()
    insert_blocks(stage, (1,), 1 / 4, fusion_types=("channel_mul", "channel_add"))
    for name, parameter in stage.named_parameters():
        if "context_block" in name:
            nn.init.normal_(parameter, std=0.3)
    return stage


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_modes_in_a_resnet_stage(kernels, libraries, mode):
    stage = stage_with_blocks()
    compiled = torch.compile(stage, fullgraph=True, mode=mode)
    for index, shape in enumerate(((2, 16, 8, 6), (3, 16, 9, 7))):
        x, grad = (torch.randn(shape, generator=torch.Generator().manual_seed(2 * index + turn)) for turn in (0, 1))
        results = []
        for module in (compiled, stage):
            stage.zero_grad()
            leaf = x.clone().requires_grad_()
            out = module(leaf)
            out.backward(grad)
            results.append([out.detach().clone(), leaf.grad, *(parameter.grad.clone() for parameter in stage.parameters())])
        for got, want in zip(*results, strict=True):
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_a_resnet_stage_is_traced_for_two_sizes_and_no_more(kernels, libraries):
    """Static at first, dynamic at the second size. (Inductor compiles convolutions anew for every size, blocks or not.)"""
    graphs = []

    def counted(module, _inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(stage_with_blocks(), fullgraph=True, backend=counted)
    for samples, height, width in ((2, 8, 6), (3, 9, 7), (5, 12, 10), (4, 7, 11)):
        compiled(torch.randn(samples, 16, height, width))
    assert len(graphs) == 2


def test_backward_is_the_kernel(kernels, backend):
    """The graph of backward has the backward operator, and nothing of plain PyTorch in its place."""
    forward, backward = [], []

    def keep(graphs):
        return make_boxed_compiler(lambda module, example_inputs: graphs.append(module) or module)

    function = torch.compile(
        grid.flat(backend.global_context),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=keep(forward), bw_compiler=keep(backward)),
    )
    grid.run(function, Case((2, 12, 6, 7)).inputs(backend.to), torch.ones(2, 12, 6, 7, device=backend.device))

    def operators(module):
        return [
            str(node.target) for node in module.graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)
        ]

    assert operators(forward[0]) == ["gcnet_ext.global_context.default"]
    assert [name for name in operators(backward[0]) if "gcnet_ext" in name] == ["gcnet_ext.global_context_backward.default"]
    assert len(operators(backward[0])) <= 3


@pytest.mark.parametrize("dtype", grid.HALF)
def test_half(kernels, backend, dtype):
    """With float32 parameters, as under autocast."""
    function = grid.flat(backend.global_context)
    inputs = Case((2, 12, 6, 7), dtype, parameter_dtype=torch.float32).inputs(backend.to)
    want, got = grid.run(function, inputs), grid.run(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    assert got.out.dtype == dtype
    assert torch.equal(got.out, want.out)


def test_fallback_compiles_as_well(monkeypatch):
    """Plain PyTorch under the compiler: no graph break by the warning."""
    monkeypatch.setattr(gcnet_ext._load, "kernel_devices", frozenset())
    monkeypatch.setattr(gcnet_ext.ops._dispatch, "_warned", set())
    inputs = Case((2, 12, 6, 7)).inputs()
    function = grid.flat(gcnet_ext.global_context)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.allclose(got, grid.flat(reference.global_context)(*inputs), rtol=1e-5, atol=1e-5)


def test_a_call_in_between_compiles_nothing_anew(kernels, cpu):
    """What a block remembers of its submodules after an eager call is nothing that a graph depends on."""
    block = GlobalContextBlock(8, 0.5)
    compiled = torch.compile(block, fullgraph=True)
    x = Random(0).feature_map((2, 8, 5, 6), torch.float32)
    with torch.no_grad():
        want = compiled(x)
        assert torch.allclose(block(x), want)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(x), want)


# ---- opcheck -----------------------------------------------------------------------------------------------------------------


def opcheck(op: str, *arguments, **more) -> None:
    """Schema, fake tensors, autograd registration and compilation of one call."""
    flat = schema.Flat(op)
    results = torch.library.opcheck(flat.op, flat.nested(*arguments, **more))
    assert set(results.values()) == {"SUCCESS"}


def leaves(tensors):
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]


CASES = [
    Case((2, 6, 4, 5)),
    Case((2, 6, 4, 5), torch.bfloat16, "channels_last", fusion="mul", parameter_dtype=torch.float32),
    Case((2, 6, 7), torch.float64, "contiguous", "avg", "add"),
    Case((2, 6, 4, 5), torch.float16, "cropped", "att", "add"),
    Case((2, 6, 2, 3, 4), torch.float32, "channels_last", "avg", "both", hidden=1),
    Case((2, 6, 4, 5), torch.float32, "cropped_channels_last", "att", "mul"),
    Case((1, 1, 1, 1), torch.float32),
    Case((0, 6, 4, 5), torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", [name for name, operator in OPERATORS.items() if not operator.in_place])
def test_opcheck(kernels, backend, op, case):
    """Forward with inputs that require gradients; backward with all gradients wanted, and each alone."""
    arguments, needs = operator_arguments(backend.ops, op, case, backend.to), OPERATORS[op].needs
    if not OPERATORS[op].saved and "grad" not in arguments:
        inputs = OP_OF[op].inputs
        arguments |= dict(zip(inputs, leaves(arguments[name] for name in inputs), strict=True))
    opcheck(op, **arguments)
    for need in needs:
        opcheck(op, **arguments | {name: name == need for name in needs})


@pytest.mark.parametrize("hard_sigmoid", [False, True])
@pytest.mark.parametrize(
    "missing", [("scale_w2", "scale_b2", "scale_norm_weight", "scale_norm_bias"), ("mask_bias", "shift_b1")]
)
def test_opcheck_of_options(kernels, backend, missing, hard_sigmoid):
    hidden = 6 if "scale_w2" in missing else 3
    inputs = Case((2, 6, 4, 5), hidden=hidden, missing=missing).inputs(backend.to)
    opcheck("global_context", *leaves(inputs), norm_eps=None, activation=2, hard_gate=[0.2, 0.5] if hard_sigmoid else None)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inference_copies_no_map_into_another_format(kernels, fresh_dynamo, layout):
    """torch.compile makes the convolutions channels_last, and the operator between two of them gets and returns it so."""
    net = nn.Sequential(nn.Conv2d(8, 32, 1), GlobalContextBlock(32, 1 / 4), nn.Conv2d(32, 8, 1)).eval()
    x = torch.randn(2, 8, 12, 14).contiguous(memory_format=layout)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        want = net(x)
        got, code = run_and_get_code(torch.compile(net, fullgraph=True), x)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert got.stride() == want.stride()
    (source,) = code
    (call,) = re.findall(r"global_context_inference\.default\((\w+),", source)
    assert re.search(rf"\b{call} = extern_kernels\.convolution\(", source), (
        "the operator reads what the convolution has written"
    )
