"""SqueezeExcitation against the block in eager PyTorch, in float64 and with random parameters."""

from __future__ import annotations

import eager
import grid
import pytest
import torch
from grid import Case, Random
from test_global_context_block import check, gradcheck_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gcnet_ext import SqueezeExcitation, _load


class HardSigmoid(nn.Module):
    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.alpha * x + self.beta).clamp(0, 1)


OPTIONS = {
    "relu, sigmoid": ({}, nn.ReLU, nn.Sigmoid),
    "silu": ({"activation": "silu"}, nn.SiLU, nn.Sigmoid),
    "hard sigmoid of torch": ({"gate": "hard_sigmoid"}, nn.ReLU, nn.Hardsigmoid),
    "hard sigmoid of ONNX": (
        {"gate": "hard_sigmoid", "gate_alpha": 0.2, "gate_beta": 0.5, "activation": "silu"},
        nn.SiLU,
        lambda: HardSigmoid(0.2, 0.5),
    ),
}


def pair(backend, channels: int, planes: int, kind: str = "relu, sigmoid"):
    options, activation, gate = OPTIONS[kind]
    truth = eager.randomise(eager.SqueezeExcitation(channels, planes, activation(), gate()))
    block = SqueezeExcitation(channels, planes=planes, device=backend.device, **options)
    block.load_state_dict(truth.state_dict(), strict=True)
    return block, truth.double()


@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
def test_dtypes_and_layouts(backend, dtype, layout):
    check(*pair(backend, 16, 4), Random(1, backend.to).feature_map((2, 16, 5, 7), dtype, layout))


@pytest.mark.parametrize("case", grid.distinct(grid.sizes(), pooling="avg", fusion="mul"), ids=str)
def test_sizes(backend, case: Case):
    channels = case.shape[1]
    check(*pair(backend, channels, case.hidden), Random(1, backend.to).feature_map(case.shape, case.dtype, case.layout), 400)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_activations_and_gates(backend, kind, layout):
    check(*pair(backend, 16, 8, kind), Random(1, backend.to).feature_map((3, 16, 6, 7), torch.float32, layout))


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("kind", [kind for kind in OPTIONS if "hard" not in kind])
def test_gradcheck(backend, kind, layout):
    block = pair(backend, 4, 2, kind)[0].double()
    x = Random(1, backend.to).feature_map((2, 4, 3, 2), torch.float64, layout).requires_grad_()
    assert gradcheck_module(block, x)


def test_one_operator(backend):
    """The whole block is one call of the fused operator."""
    if not backend.has_kernels:
        pytest.skip("no kernels")
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            calls.append(op)
            return op(*args, **(kwargs or {}))

    block, x = pair(backend, 16, 4)[0], Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    with torch.no_grad(), Count():
        block(x)
    assert calls == [torch.ops.gcnet_ext.global_context_inference.default]


@pytest.mark.parametrize("change", ["hook", "activation", "convolution"])
def test_a_submodule_that_is_not_the_plain_layer(backend, change):
    block, truth = pair(backend, 16, 4)
    for module in (block, truth):
        if change == "hook":
            module.fc1.register_forward_hook(lambda _module, _args, out: 2 * out)
        elif change == "activation":
            module.activation = nn.Tanh()
        else:
            module.fc2 = nn.Sequential(module.fc2, nn.Tanh())
    check(block, truth, Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32))


@pytest.mark.parametrize("spatial", [(20,), (4, 5), (2, 2, 5)], ids=str)
def test_any_number_of_spatial_dimensions(backend, spatial):
    check(*pair(backend, 16, 4), Random(1, backend.to).feature_map((2, 16, *spatial), torch.float32))


def test_without_bias(backend):
    block, truth = pair(backend, 16, 4)
    bare = SqueezeExcitation(16, planes=4, bias=False, device=backend.device)
    bare.load_state_dict({name: tensor for name, tensor in block.state_dict().items() if "weight" in name}, strict=True)
    for layer in (truth.fc1, truth.fc2):
        layer.bias = None
    check(bare, truth, Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32))


def test_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in SqueezeExcitation(32, 1 / 4).state_dict().items()}
    assert shapes == {"fc1.weight": (8, 32, 1, 1), "fc1.bias": (8,), "fc2.weight": (32, 8, 1, 1), "fc2.bias": (32,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation must be one of .*'relu', 'silu'.* got 'tanh'"),
        ({"final_activation": "silu"}, "final_activation must be one of .*'none', 'relu'.* got 'silu'"),
        ({"gate": "tanh"}, "gate must be one of .*'sigmoid', 'hard_sigmoid'.* got 'tanh'"),
        ({"ratio": 1 / 64}, r"inplanes \* ratio must be at least 1"),
        ({"planes": 0}, "planes must be at least 1"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SqueezeExcitation(32, **options)


def test_wrong_input():
    block = SqueezeExcitation(16)
    with pytest.raises(RuntimeError, match=r"x must have 16 channels \(inplanes\), got shape \[2, 8, 4, 4\]"):
        block(torch.ones(2, 8, 4, 4))
    with pytest.raises(RuntimeError, match="x must have at least one position to pool over"):
        block(torch.ones(2, 16, 0, 4))


def test_compile(backend):
    if backend.name not in _load.kernel_devices:
        pytest.skip("compiled once, on the CPU")
    block = pair(backend, 16, 4)[0]
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    assert torch.allclose(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
