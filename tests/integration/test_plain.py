"""Plain PyTorch on demand: gcnet_ext.plain(), GCNET_EXT_PLAIN, gcnet_ext.decompositions(), and programs exported before."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from calls import operator_arguments
from grid import Case, Random
from recorder import Recorder, operators_in
from registry import OPERATORS, OPS
from schema import Flat
from small_blocks import BLOCKS, randomised
from torch import nn
from torch.export import Dim

import gcnet_ext

pytestmark = pytest.mark.usefixtures("kernels")
CASES = (Case((2, 6, 4, 5)), Case((1, 9, 7), fusion="add"), Case((3, 4, 2, 3, 2), torch.float64, pooling="avg", fusion="mul"))


def recorded(function, *args) -> list[str]:
    with Recorder() as seen:
        function(*args)
    return seen.names


# ---- the switch --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_operator_runs(op, case):
    """Neither forward nor backward, and the results are those of the operators to rounding."""
    inputs = [None if tensor is None else tensor.requires_grad_() for tensor in OPS[op].inputs_of(case)]

    def step():
        out = OPS[op].ours(*inputs)
        grads = torch.autograd.grad(out.sum(), [tensor for tensor in inputs if tensor is not None], allow_unused=True)
        return out, *(grad for grad in grads if grad is not None)

    want = step()
    assert recorded(step)
    with gcnet_ext.plain():
        assert recorded(step) == []
        for got, true in zip(step(), want, strict=True):
            assert torch.allclose(got, true, rtol=1e-4, atol=1e-5)
    assert recorded(step), "the switch is back where it was"


def test_contexts_in_each_other():
    x = torch.ones(2, 3, 4)

    def runs() -> bool:
        return bool(recorded(gcnet_ext.attention_pool, x))

    with gcnet_ext.plain():
        with gcnet_ext.plain(False):
            assert runs()
            with gcnet_ext.plain():
                assert not runs()
            assert runs()
        assert not runs()
        with pytest.raises(ZeroDivisionError), gcnet_ext.plain(False):
            raise ZeroDivisionError
        assert not runs()
        found = []
        other = threading.Thread(target=lambda: found.append(runs()))
        other.start()
        other.join()
        assert found == [True], "another thread has a switch of its own"
    assert runs()


@pytest.mark.parametrize("enabled", [1, None, "yes"])
def test_the_switch_is_true_or_false(enabled):
    with pytest.raises(TypeError, match="enabled must be True or False, got "), gcnet_ext.plain(enabled):
        pass


IN_THE_ENVIRONMENT = """
import torch, gcnet_ext
from recorder import Recorder, operators_in
block, x = gcnet_ext.GlobalContextBlock(8, 1 / 4), torch.randn(2, 8, 3, 3)
def runs():
    with Recorder() as seen:
        block(x)
    return bool(seen.names)
assert runs() == ({value!r} != "1")
with gcnet_ext.plain(False):
    assert runs()
assert bool(operators_in(torch.export.export(block, (x,)).graph)) == ({value!r} != "1")
"""


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_variable(python, value):
    python(IN_THE_ENVIRONMENT.format(value=value), GCNET_EXT_PLAIN=value)


def test_a_block_that_overwrites_its_input():
    block, x = randomised(BLOCKS["se"](inplace=True)), torch.randn(2, 16, 3, 4)
    with torch.no_grad(), gcnet_ext.plain():
        given = x.clone()
        assert block(given) is given
        assert torch.allclose(given, block(x.clone()))
        assert recorded(block, x) == []


def test_compiled_code_follows_the_switch(fresh_dynamo):
    """A block that was compiled outside is captured anew inside, and neither graph is lost."""
    captured = []

    def backend(graph_module, _inputs):
        captured.append(operators_in(graph_module.graph))
        return graph_module

    block, x = randomised(BLOCKS["gc"]()), torch.randn(2, 16, 5, 4)
    compiled, want = torch.compile(block, backend=backend, fullgraph=True), block(x)
    for _ in range(2):
        assert torch.allclose(compiled(x), want, atol=1e-5)
        with gcnet_ext.plain():
            assert torch.allclose(compiled(x), want, atol=1e-5)
    assert captured == [["gcnet_ext.global_context_inference.default"], []]


# ---- programs ----------------------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A block with all that it takes, and the functions."""

    def __init__(self, kind: str, **options) -> None:
        super().__init__()
        self.block = randomised(BLOCKS[kind](**options))

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        out = self.block(x * 1, x.flip(1), valid)
        context = gcnet_ext.attention_pool(out, valid=valid)
        return gcnet_ext.channel_fuse(out, context, out.flatten(2).amax(2), final_activation="relu")


def inputs_of(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = Random(sum(shape)).normal(*shape, dtype=torch.float32)
    return x, x[:, 0] > -0.5


N, H, W = Dim("n", max=64), Dim("h", min=2, max=64), Dim("w", min=2, max=64)
PROGRAMS = {
    "gc": lambda: Around("gc", final_activation="relu"),
    "se": lambda: Around("se", gate="hard_sigmoid", activation="gelu"),
    "se, in place": lambda: Around("se", inplace=True).requires_grad_(False),
    "snl": lambda: Around("snl"),
}


def exported(model: nn.Module, **options) -> torch.export.ExportedProgram:
    return torch.export.export(
        model, inputs_of(2, 16, 6, 5), dynamic_shapes=({0: N, 2: H, 3: W}, {0: N, 1: H, 2: W}), **options
    )


def assert_same(program: torch.export.ExportedProgram, model: nn.Module) -> None:
    for shape in ((2, 16, 6, 5), (3, 16, 4, 9), (5, 16, 2, 2)):
        assert torch.allclose(program.module()(*inputs_of(*shape)), model(*inputs_of(*shape)), atol=1e-5), shape


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_export_in_it(name, strict):
    model = PROGRAMS[name]()
    with gcnet_ext.plain():
        program = exported(model, strict=strict)
    assert operators_in(program.graph) == []
    assert_same(program, model)


@pytest.mark.parametrize("way", ["table", "both tables", "switch"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_from_before(name, way):
    model = PROGRAMS[name]()
    program = exported(model)
    assert len(operators_in(program.graph)) == 3
    assert operators_in(program.run_decompositions().graph), "torch alone leaves the operators"
    if way == "switch":
        with gcnet_ext.plain():
            program = program.run_decompositions()
    else:
        table = torch.export.default_decompositions() if way == "both tables" else {}
        table.update(gcnet_ext.decompositions())
        program = program.run_decompositions(table)
    assert operators_in(program.graph) == []
    namespaces = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert namespaces == {"aten"}
    assert_same(program, model)


FORWARD = [name for name in OPERATORS if not name.endswith(("_", "_backward"))]


def test_the_table_has_every_operator_of_the_forward_pass():
    table = gcnet_ext.decompositions()
    assert set(table) == {getattr(torch.ops.gcnet_ext, name).default for name in FORWARD}
    table.clear()
    assert gcnet_ext.decompositions(), "everybody gets a table of one's own"


@pytest.mark.parametrize("final_activation", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [*CASES, Case((2, 11, 3, 3), fusion="both")], ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_all_results_are_those_of_the_operator(name, case, layout, final_activation):
    """What backward reads is among them, down to the bits of the final ReLU."""
    if layout == "channels_last" and len(case.shape) != 4:
        pytest.skip("channels_last is for images")
    arguments = operator_arguments(SimpleNamespace(), name, case._replace(layout=layout))
    if "final_activation" in arguments:
        arguments["final_activation"] = final_activation
    if name == "channel_fuse":
        arguments["x"][(0,) * len(case.shape)] = torch.nan
    operator = Flat(name)
    args = operator.nested(**arguments)
    want, got = operator.op(*args), gcnet_ext.decompositions()[operator.op](*args)
    for ours, true in zip(*([each] if torch.is_tensor(each) else each for each in (got, want)), strict=True):
        assert (ours.shape, ours.dtype) == (true.shape, true.dtype)
        if true.dtype == torch.uint8:
            assert torch.equal(ours, true)
        assert torch.allclose(ours, true, rtol=1e-4, atol=1e-5, equal_nan=True)
