"""What TorchScript makes of blocks: traces in plain PyTorch or with the operator, ONNX by torch.onnx.export(dynamo=False)"""

from __future__ import annotations

import re

import pytest
import torch
from grid import Random
from recorder import kinds_in
from small_blocks import BLOCKS, randomised
from torch import nn

import gcnet_ext
from gcnet_ext import EffectiveSqueezeExcitation, EfficientChannelAttention, GlobalResponseNorm, NonLocalBlock
from gcnet_ext.blocks.non_local import MODES

pytestmark = pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and tells of every look at a shape
LIBRARY = gcnet_ext._load.library and str(gcnet_ext._load.library)
FUSED = {
    "gc": lambda: BLOCKS["gc"](gate="hard_sigmoid", activation="leaky_relu", final_activation="relu"),
    "gc, average": lambda: BLOCKS["gc"](pooling_type="avg", norm=False, activation="gelu_tanh"),
    "se": lambda: BLOCKS["se"](activation="hardswish"),
    "snl": BLOCKS["snl"],
    "ese": lambda: EffectiveSqueezeExcitation(16, gate="hard_sigmoid", final_activation="relu"),
    "eca": lambda: EfficientChannelAttention(16, 5, final_activation="relu"),
}
EVERY = {
    **FUSED,
    "grn": lambda: GlobalResponseNorm(16),
    **{f"nl, {mode}": lambda mode=mode: NonLocalBlock(16, mode=mode, sub_sample=mode < "e", norm="batch") for mode in MODES},
}
SHAPES = ((2, 16, 8, 6), (3, 16, 5, 9), (1, 16, 2, 2))


class Whole(nn.Module):
    """A block with a residual and positions that do not count; in one sample none counts."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sample = torch.ones_like(x[:, 0]).cumsum(0)
        return self.block(x, x.flip(3), (x[:, 0] > -0.3) & (sample > 1.5))


class Alone(Whole):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


MODELS = {
    **{name: lambda make=make: Alone(randomised(make())).eval() for name, make in EVERY.items()},
    **{f"{name}, whole": lambda make=make: Whole(randomised(make())).eval() for name, make in FUSED.items()},
}


def image(shape: tuple[int, ...]) -> torch.Tensor:
    return Random(sum(shape)).normal(*shape)


ELSEWHERE = """
import sys, torch
model, inputs, outputs, library = sys.argv[1:] if len(sys.argv) > 1 else {arguments}
if library:
    try:
        torch.jit.load(model)
    except RuntimeError as error:
        assert "gcnet_ext" in str(error), error
    else:
        raise AssertionError("the file loads without the operators")
    torch.ops.load_library(library)
loaded = torch.jit.load(model)
for x, want in zip(torch.load(inputs), torch.load(outputs)):
    assert (loaded(x) - want).abs().max() <= 1e-5 * want.abs().max()
assert "gcnet_ext" not in sys.modules
"""


def assert_runs_elsewhere(python, traced, model: nn.Module, folder, library: str = "") -> None:
    """In a process that never imports this package, at other sizes."""
    paths = [str(folder / name) for name in ("model.pt", "inputs.pt", "outputs.pt")]
    torch.jit.save(traced, paths[0])
    torch.save([image(shape) for shape in SHAPES], paths[1])
    torch.save([model(image(shape)).detach() for shape in SHAPES], paths[2])
    python(ELSEWHERE.format(arguments=[*paths, library]))


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_runs_without_this_package(name, python, tmp_path):
    model = MODELS[name]()
    traced = torch.jit.trace(model, image(SHAPES[0]))
    assert {kind.split("::")[0] for kind in kinds_in(traced)} == {"aten"}
    assert_runs_elsewhere(python, traced, model, tmp_path)


@pytest.mark.parametrize("kind", ["gc, whole", "gc, average", "se, whole", "snl"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_trace_that_keeps_the_operator(kind, gradients, python, tmp_path, kernels):
    """It computes what the block computes, with its gradients where this package is, and loads where the library is."""
    model = MODELS[kind]()
    with torch.set_grad_enabled(gradients), gcnet_ext.plain(False):
        traced = torch.jit.trace(model, image(SHAPES[0]))
    assert [kind for kind in kinds_in(traced) if "gcnet_ext" in kind] == ["gcnet_ext::global_context_inference"]
    for shape in SHAPES:
        leaves = [image(shape).requires_grad_() for _ in range(2)]
        outputs = [function(leaf) for function, leaf in zip((traced, model), leaves, strict=True)]
        assert torch.equal(*outputs)
        assert torch.equal(
            *(torch.autograd.grad(out.square().sum(), leaf)[0] for out, leaf in zip(outputs, leaves, strict=True))
        )
    assert_runs_elsewhere(python, traced, model, tmp_path, LIBRARY)


def test_the_functions_in_a_trace(kernels):
    weight, context = torch.randn(16), torch.randn(2, 16)

    def both(x):
        return gcnet_ext.channel_fuse(x, gcnet_ext.attention_pool(x, weight), context, final_activation="relu")

    x = image(SHAPES[0])
    for keep, namespaces in ((False, {"aten"}), (True, {"aten", "gcnet_ext"})):
        with gcnet_ext.plain(not keep):
            traced = torch.jit.trace(both, x)
        assert {kind.split("::")[0] for kind in kinds_in(traced)} - {"prim"} <= namespaces
        assert any("gcnet_ext" in kind for kind in kinds_in(traced)) == keep
        assert torch.allclose(traced(x), both(x), atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_a_traced_block_overwrites_its_input(keep, kernels):
    block = randomised(BLOCKS["se"](inplace=True)).requires_grad_(False)
    want = block(image(SHAPES[1]))
    with gcnet_ext.plain(False) if keep else torch.no_grad():
        traced = torch.jit.trace(block, image(SHAPES[0]))
    given = image(SHAPES[1])
    assert torch.allclose(traced(given), want, atol=1e-6)
    assert torch.allclose(given, want, atol=1e-6)


def test_tensorboard_draws_a_model(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(nn.Sequential(nn.Conv2d(16, 16, 1), BLOCKS["gc"](), NonLocalBlock(16)), image(SHAPES[1]))
    assert any(path.stat().st_size > 1000 for path in tmp_path.iterdir())


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_by_way_of_torchscript(name, opset, tmp_path):
    """Standard operators, and onnxruntime's results at other sizes are ours."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, path = MODELS[name](), str(tmp_path / "model.onnx")
    axes = {"x": {0: "n", 2: "h", 3: "w"}, "y": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(
        model, (image(SHAPES[0]),), path, dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"],
        dynamic_axes=axes,
    )  # fmt: skip
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        want = model(image(shape)).detach()
        (got,) = session.run(None, {"x": image(shape).numpy()})
        assert (torch.from_numpy(got) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", EVERY)
def test_onnx_of_a_block_alone(name, tmp_path):
    """The exporter passes the defaults of all arguments of a model's forward by their place."""
    onnxruntime = pytest.importorskip("onnxruntime")
    block, x, other = EVERY[name]().eval(), image(SHAPES[0]), image(SHAPES[1])
    path = str(tmp_path / "block.onnx")
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(block, (x,), path, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path)
    for given in (x, other):
        (got,) = session.run(None, {"x": given.numpy()})
        assert torch.allclose(torch.from_numpy(got), block(given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("before", ["", "switch"])
@pytest.mark.parametrize("name", ["gc", "se, whole", "snl, whole"])
def test_onnx_of_an_exported_program(name, before, tmp_path, kernels):
    """The program has our operators, as it was exported for something else."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = MODELS[name](), str(tmp_path / "model.onnx")
    sizes = {0: torch.export.Dim("n", max=64), 2: torch.export.Dim("h", min=2, max=64), 3: torch.export.Dim("w", min=2, max=64)}
    program = torch.export.export(model, (image(SHAPES[0]),), dynamic_shapes=(sizes,))
    assert any("gcnet_ext" in str(node.target) for node in program.graph.nodes)
    with gcnet_ext.plain() if before else torch.no_grad():
        torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES[:2]:
        want = model(image(shape)).detach()
        (got,) = session.run(None, {session.get_inputs()[0].name: image(shape).numpy()})
        assert (torch.from_numpy(got) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", EVERY)
def test_a_script_is_refused_in_a_sentence(name):
    """The block, a model that holds it, and a replaced one; the model is left as it was."""
    block = EVERY[name]()
    for model in (block, nn.Sequential(nn.Conv2d(16, 16, 1), nn.ModuleDict({"deep": block}))):
        with pytest.raises(
            RuntimeError, match=r"^torch\.jit\.script cannot compile a \w+, .*gcnet_ext\.to_plain\(model\)"
        ) as told:
            torch.jit.script(model)
        assert type(block).__name__ in str(told.value)
        assert not re.search(r"\n|  ", str(told.value))
    assert model[1]["deep"] is block
