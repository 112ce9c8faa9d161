"""Who computes: compiled kernels where there are some, plain PyTorch elsewhere, with one warning; autocast, meta and fake."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import grid
import pytest
import torch
from entry import Op
from grid import Case, Random
from recorder import Recorder
from registry import OPS
from torch._subclasses.fake_tensor import FakeTensorMode

import gcnet_ext
from gcnet_ext import GlobalContextBlock, _load
from gcnet_ext.ops import _dispatch

CASE = Case((2, 6, 4, 5))


def of_op(op: Op):
    return lambda x: op.ours(x, *op.inputs_of(CASE, lambda tensor: tensor.to(x.device))[1:])


FUNCTIONS = {
    **{name: of_op(op) for name, op in OPS.items()},
    "attention_map": lambda x: gcnet_ext.attention_map(x, x[0].flatten(1)[:, 0]),
    "GlobalContextBlock": lambda x: GlobalContextBlock(6, 0.5, device=x.device)(x),
}
# What computes where nothing is differentiated; the parameters of a block require gradients.
COMPUTES = {
    **{name: op.of_inference for name, op in OPS.items()},
    "attention_map": "attention_pool",
    "GlobalContextBlock": "global_context",
}


@pytest.fixture
def no_kernels(monkeypatch):
    """As on a device without kernels: the fallback, and its warning not yet given."""
    monkeypatch.setattr(_load, "kernel_devices", frozenset())
    monkeypatch.setattr(_dispatch, "_warned", set())


def test_the_library_is_loaded():
    """The rest of the suite would pass on plain PyTorch alone: here, and only here, that is an error."""
    if os.environ.get("GCNET_EXT_TEST_FALLBACK", "0") == "1":
        pytest.skip("GCNET_EXT_TEST_FALLBACK=1: the tests are to run on plain PyTorch")
    assert _load.compiled is not None, _load.why_no_kernels("cpu")
    assert "cpu" in _load.kernel_devices


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_compute(kernels, backend, name):
    x = Random(0, backend.to).feature_map((2, 6, 4, 5), torch.float32)
    with Recorder() as recorder, warnings.catch_warnings():
        warnings.simplefilter("error")
        FUNCTIONS[name](x)
    assert recorder.names == [COMPUTES[name]]


def test_one_operator_per_direction(kernels, backend):
    """The block is one operator forward and one backward, whatever it needs."""
    block = GlobalContextBlock(6, 0.5, fusion_types=("channel_mul", "channel_add"), device=backend.device)
    x = Random(0, backend.to).feature_map((2, 6, 4, 5), torch.float32).requires_grad_()
    with Recorder() as recorder:
        block(x).sum().backward()
    assert recorder.names == ["global_context", "global_context_backward"]


def test_no_graph_under_no_grad(kernels, cpu):
    """Inference with parameters that require gradients records nothing."""
    inputs = Case((2, 6, 4, 5)).inputs()
    with Recorder() as recorder, torch.no_grad():
        out = grid.flat(gcnet_ext.global_context)(inputs[0].requires_grad_(), *inputs[1:])
    assert recorder.names == ["global_context_inference"]
    assert not out.requires_grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fallback(no_kernels, name):
    """Plain PyTorch gives the same result, and says once that it was used and why."""
    x = Random(0).feature_map((2, 6, 4, 5), torch.float32)
    with Recorder() as recorder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            FUNCTIONS[name](x)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert str(caught[0].message).startswith("gcnet_ext uses plain PyTorch on cpu: ")
    assert recorder.names == []


def test_fallback_equals_the_kernels(kernels, monkeypatch, cpu):
    """Forward and gradients, to rounding."""
    inputs = Case((2, 10, 5, 7)).inputs()
    grad = Random(1).feature_map((2, 10, 5, 7), torch.float32)
    with_kernels = grid.run(grid.flat(gcnet_ext.global_context), inputs, grad)
    monkeypatch.setattr(_load, "kernel_devices", frozenset())
    monkeypatch.setattr(_dispatch, "_warned", {"cpu"})
    without = grid.run(grid.flat(gcnet_ext.global_context), inputs, grad)
    assert torch.allclose(with_kernels.out, without.out, rtol=1e-5, atol=1e-5)
    for name, ours, theirs in zip(grid.GLOBAL_CONTEXT_INPUTS, with_kernels.grads, without.grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3), name


def test_fallback_of_the_attention_map(kernels, monkeypatch, cpu):
    """It leaves no graph behind, either."""
    x, weight, bias = (tensor.requires_grad_() for tensor in Case((2, 6, 4, 5)).inputs()[:3])
    want = gcnet_ext.attention_map(x, weight, bias)
    monkeypatch.setattr(_load, "kernel_devices", frozenset())
    monkeypatch.setattr(_dispatch, "_warned", {"cpu"})
    got = gcnet_ext.attention_map(x, weight, bias)
    assert not got.requires_grad
    assert torch.allclose(got, want, rtol=1e-4)


def test_fallback_refuses_what_the_kernels_refuse(no_kernels, monkeypatch):
    """A branch without its first weight is a mistake, not a branch that is missing."""
    monkeypatch.setattr(_dispatch, "_warned", {"cpu"})
    branch = gcnet_ext.Branch(torch.ones(6, 6))
    with pytest.raises(RuntimeError, match="scale_b1 must come with a scale_w1, got scale_w1 None"):
        gcnet_ext.global_context(torch.ones(2, 6, 4), scale=gcnet_ext.Branch(None, torch.ones(6)), shift=branch)


def test_other_devices_fall_back_without_a_word(no_kernels):
    """A device that never has kernels is no reason for a warning."""
    x = torch.empty(2, 6, 4, 5, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gcnet_ext.attention_pool(x).device.type == "meta"


def test_words_of_the_warning():
    """Why, and what to do about it."""
    no_cuda = _load.why_no_kernels("cuda")
    if _load.load_error is None and _load.compiled.build_info()["cuda"]:
        if _load.cuda_error is None:
            pytest.skip("this build has CUDA kernels, and they are loaded")
        assert no_cuda == _load.cuda_error
    elif _load.load_error is None:
        why = _load.compiled.build_info()["without_cuda"]
        assert "; for CUDA kernels " in why
        assert no_cuda == f"this build has no CUDA kernels: {why}, and {_load.HOW_TO_BUILD}"
        assert _load.why_no_kernels("xpu") == "there are no kernels for xpu"
        assert "pip install --no-build-isolation ." in no_cuda
    else:
        assert str(_load.load_error) in no_cuda
        assert "pip install --no-build-isolation ." in no_cuda


def test_words_about_kernels_of_another_cuda(kernels, monkeypatch):
    """As after an isolated build, which fetches a torch of its own: the CUDA library is not loaded, and what to do is said."""
    info = {**_load.compiled.build_info(), "cuda": "12.8"}
    monkeypatch.setattr(_load, "compiled", SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _load._load_cuda() == (
        f"the CUDA kernels are built with CUDA 12.8 and torch {torch.__version__} with CUDA 13.0: "
        f"the major versions must agree; "
        f"{_load.HOW_TO_BUILD}, which uses the installed torch"
    )


BROKEN = """
import sys, warnings
sys.modules["gcnet_ext._C"] = None  # importing it now is an ImportError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, gcnet_ext
    from gcnet_ext import _load
    import reference
    assert not caught, "importing alone is no reason to warn"
    x = torch.randn(2, 6, 4, 5)
    block = gcnet_ext.GlobalContextBlock(6, 0.5)
    for _ in range(2):
        assert torch.equal(gcnet_ext.attention_pool(x), reference.attention_pool(x))
        assert torch.equal(block(x), x / 2)
print(len(caught), caught[0].category.__name__, caught[0].message)
assert isinstance(_load.load_error, ImportError) and _load.compiled is None
"""


def test_library_that_cannot_be_loaded(python):
    """The package works, the reason is kept, and the first call says it, once, with the way out."""
    told = python(BROKEN, GCNET_EXT_JIT="0").stdout
    assert told.startswith("1 RuntimeWarning gcnet_ext uses plain PyTorch on cpu: the compiled kernels could not be loaded (")
    assert "import of gcnet_ext._C halted" in told
    assert "build them with `pip install --no-build-isolation .`" in told
    in_the_checkout = f"run in another folder: here Python imports the checkout {Path(_load.__file__).parents[1]}"
    assert (in_the_checkout in told) == (Path(_load.__file__).parents[1] / "csrc").is_dir()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fallback", [False, True], ids=["kernels", "plain PyTorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_nothing(backend, monkeypatch, dtype, fallback, autocast):
    """Output and gradients have the dtypes and the bits that they have without it."""
    if fallback:
        monkeypatch.setattr(_load, "kernel_devices", frozenset())
        monkeypatch.setattr(_dispatch, "_warned", {"cpu", "cuda"})
    for op in OPS.values():

        def under_autocast(*arguments, op=op):
            with torch.autocast(backend.device.type, dtype=autocast):
                return op.ours(*arguments)

        tensors = op.inputs_of(Case((2, 10, 5, 7), dtype, parameter_dtype=torch.float32), backend.to)
        plain, got = grid.run(op.ours, tensors), grid.run(under_autocast, tensors)
        assert got.out.dtype == plain.out.dtype == dtype
        assert torch.equal(got.out, plain.out)
        for ours, theirs in zip(got.grads, plain.grads, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_block_under_autocast(backend, layout):
    """Between a convolution that autocast runs in bfloat16 and one after it: the block takes what it gets."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), GlobalContextBlock(16, 0.25), torch.nn.Conv2d(16, 2, 1)).to(
        backend.device
    )
    seen = []
    net[1].register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    x = Random(0, backend.to).feature_map((2, 3, 9, 9), torch.float32, layout)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        net(x).float().sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert {parameter.grad.dtype for parameter in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", grid.FLOATING)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
@pytest.mark.parametrize("fusion", grid.FUSIONS)
def test_meta_and_fake_tensors(backend, dtype, layout, pooling, fusion):
    """Shapes, dtypes and strides without numbers, of outputs and gradients, are those of the real ones."""
    inputs = Case((2, 10, 5, 7), dtype, layout, pooling, fusion).inputs(backend.to)
    real = grid.run(grid.flat(backend.global_context), inputs)

    def described(result: grid.Result):
        return [None if t is None else (t.shape, t.dtype, t.stride()) for t in (result.out, *result.grads)]

    meta = [None if tensor is None else tensor.to("meta") for tensor in inputs]
    on_meta = grid.run(grid.flat(gcnet_ext.global_context), meta)
    with FakeTensorMode() as mode:
        fake = grid.run(
            grid.flat(backend.global_context), [None if tensor is None else mode.from_tensor(tensor) for tensor in inputs]
        )
    assert described(on_meta) == described(real)
    assert described(fake) == described(real)
    assert on_meta.out.device.type == "meta"
    assert fake.out.device == inputs[0].device
