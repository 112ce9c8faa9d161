"""Residual blocks with their tail: in torch.compile, torch.export, ONNX, AOTInductor, checkpointing and averages of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import X
from test_tail import OWN, assert_same, blocks_of, inserted, results
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim

import gcnet_ext

pytestmark = [pytest.mark.usefixtures("libraries", "kernels"), pytest.mark.filterwarnings("ignore")]
CASES = ["gc in Bottleneck", "se in BasicBlock", "eca in Bottleneck", *OWN]
OTHER = torch.randn(5, 16, 9, 11, generator=torch.Generator().manual_seed(2))
DYNAMIC = {0: Dim("n", max=64), 2: Dim("h", min=2, max=64), 3: Dim("w", min=2, max=64)}
LAST = {f"gcnet_ext.{name}.default" for name in ("global_context_inference", "normed_global_context_inference", "channel_fuse")}
"""The operators that take an addition and a ReLU along, without what a backward pass would read."""
OVERWRITING = {f"gcnet_ext.{name}.default" for name in ("global_context_", "normed_global_context_", "channel_fuse_")}
"""Those that overwrite what a convolution returned, as well."""


def called(graph: torch.fx.Graph) -> list[str]:
    """The functions that the graph calls. An operator that overwrites is the first argument of one that copies if it must."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)]
    return [str(node.args[0] if "auto_functionalized" in str(node.target) else node.target) for node in nodes]


def replaced(case: str) -> nn.Module:
    return blocks_of(case)[1].eval()


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_net_infers_by_the_inference_operator(case, fresh_dynamo):
    """What autograd leaves of the graph ends with the operator that saves nothing for a backward pass."""
    block = replaced(case)
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _inputs: list) -> Callable:
        graphs.append(module)
        return module

    compiled = torch.compile(block, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        assert_same([compiled(X)], [block(X)])
    (graph,) = (module.graph for module in graphs)
    names = called(graph)
    assert names[-1] in LAST | OVERWRITING
    assert not any(name.startswith(("aten.add", "aten.relu")) for name in names[names.index(names[-1]) :])
    assert sum("global_context" in name for name in names) <= 1


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_net_trains(case, fresh_dynamo):
    block = replaced(case).train()
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    assert_same(results(compiled), results(block))


@pytest.mark.parametrize("case", CASES)
def test_an_exported_program_has_the_tail_in_the_operator(case):
    block = replaced(case)
    program = torch.export.export(block, (X,), dynamic_shapes=(DYNAMIC,))
    names = called(program.graph)
    assert names[-1] in LAST
    for x in (X, OTHER):
        assert_same([program.module()(x)], [block(x)])
    only_aten = program.run_decompositions(gcnet_ext.decompositions())
    assert not any("gcnet_ext" in name for name in called(only_aten.graph))
    assert_same([only_aten.module()(OTHER)], [block(OTHER)])


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_onnx(case, dynamo, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block, path = replaced(case), str(tmp_path / "model.onnx")
    if dynamo:
        torch.onnx.export(block, (X,), path, dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False)
    else:
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        torch.onnx.export(block, (X,), path, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=13)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (X, OTHER):
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same([torch.from_numpy(got)], [block(x).detach()])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gc in Bottleneck", "timm SEResNetBlock"])
def test_ahead_of_time(case, tmp_path):
    block = replaced(case)
    with torch.no_grad():
        program = torch.export.export(block, (X,), dynamic_shapes=(DYNAMIC,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        assert_same([torch._inductor.aoti_load_package(path)(OTHER)], [block(OTHER)])


class Checkpointed(nn.Module):
    """Computes its block again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("case", CASES)
def test_checkpointing(case):
    block = replaced(case)
    assert_same(results(Checkpointed(block)), results(block))


@pytest.mark.parametrize("case", CASES)
def test_state_dicts_averages_and_other_norms(case):
    """Weights travel between the block before and after; an average of weights and a SyncBatchNorm keep the tail."""
    before, after = (block.eval() for block in blocks_of(case))
    other = copy.deepcopy(after)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(before.state_dict())
    averaged = torch.optim.swa_utils.AveragedModel(after)
    averaged.update_parameters(after)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(after))
    want = before(X)
    for each in (other, averaged.module, synchronised):
        assert type(each) is type(after)
        assert_same([each(X)], [want])


def test_frozen_blocks_train_nothing():
    block = inserted().eval().requires_grad_(False)
    assert not block(X).requires_grad
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(block(x).sum(), x)
    (want,) = torch.autograd.grad(inserted(fuse_tail=False).eval()(x).sum(), x)
    assert_same([gradient], [want])
