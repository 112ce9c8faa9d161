"""clip(alpha t + beta, 0, 1) at its corners, against the float64 reference: the gradient passes there."""

from __future__ import annotations

import copy
import math

import grid
import pytest
import reference
import torch
from grid import GLOBAL_CONTEXT_INPUTS, Random

from gcnet_ext import GlobalContextBlock, SqueezeExcitation, _load

ALPHA = 0.25  # a power of two: alpha t + beta is exact, in every dtype and however it is computed
CORNERS = [-2.0, 2.0]  # with beta 0.5 exactly 0 and 1
BEYOND = [-2.5, 2.5, -math.inf, math.inf]
BETWEEN = [-1.5, 0.0, 1.0]


def gates(backend, dtype: torch.dtype, layers: int, seed: int = 0) -> tuple:
    """A block whose scale branch gives just these t, because nothing but its last bias is not zero."""
    t = torch.tensor([*CORNERS, *BEYOND, *BETWEEN, math.nan], dtype=dtype)
    channels, hidden = len(t), 3
    x = Random(seed, backend.to).normal(2, channels, 5, 7, dtype=dtype)
    if layers == 1:
        branch = (torch.zeros(channels, channels, dtype=dtype), t, None, None, None, None)
    else:
        w2 = torch.zeros(channels, hidden, dtype=dtype)
        branch = (*Random(seed).branch(channels, hidden, dtype)[:4], w2, t)
    return (x, None, None, *(None if tensor is None else backend.to(tensor) for tensor in branch), *(None,) * 6)


@pytest.mark.representative
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", grid.FLOATING)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_at_between_and_beyond_the_corners(backend, layout, dtype, layers):
    options = {"gate": "hard_sigmoid", "gate_alpha": ALPHA, "gate_beta": 0.5}
    inputs = list(gates(backend, dtype, layers))
    inputs[0] = grid.LAYOUTS[layout](lambda *sizes: inputs[0].new_empty(sizes), *inputs[0].shape).copy_(inputs[0])
    grad = Random(1, backend.to).feature_map(inputs[0].shape, dtype, layout)
    block = grid.flat(backend.global_context, **options)
    got, want = grid.run(block, inputs, grad), grid.exact(grid.flat(reference.global_context, **options), inputs, grad)
    bias = GLOBAL_CONTEXT_INPUTS.index("scale_b1" if layers == 1 else "scale_b2")
    numbers = ~inputs[bias].isnan()
    assert torch.equal(got.out.isnan().cpu(), want.out.isnan())
    grid.assert_close(got.out[:, numbers], want.out[:, numbers.cpu()], reference.accumulation_dtype(inputs[0]))
    assert torch.equal(block(*inputs).nan_to_num(7), got.out.nan_to_num(7)), "where nothing is differentiated"
    passes = len(CORNERS)
    assert (want.grads[bias][:passes] != 0).all()
    assert (want.grads[bias][passes : passes + len(BEYOND)] == 0).all()
    grid.assert_close(got.grads[bias], want.grads[bias], reference.accumulation_dtype(inputs[0]), sums=150)


@pytest.mark.filterwarnings("ignore:gcnet_ext uses plain PyTorch")  # for the truth
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("kind", ["att", "avg", "squeeze"])
def test_a_branch_of_zeros_starts_to_learn(backend, monkeypatch, kind, beta):
    """Its gate is exactly at a corner; a step of gradient descent moves it off."""
    options = {"gate": "hard_sigmoid", "gate_alpha": ALPHA, "gate_beta": float(beta)}
    torch.manual_seed(0)
    if kind == "squeeze":
        block = SqueezeExcitation(16, planes=4, device=backend.device, **options)
        last = block.fc2
    else:
        block = GlobalContextBlock(16, 1 / 4, kind, ("channel_mul",), device=backend.device, **options)
        last = block.channel_mul_conv[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    truth = copy.deepcopy(block).double()
    x, grad = (Random(seed, backend.to).feature_map((2, 16, 5, 7), torch.float32) for seed in (0, 1))
    out = block(x)
    assert torch.equal(out, x * beta)
    out.backward(grad)
    with monkeypatch.context() as plain:
        plain.setattr(_load, "kernel_devices", frozenset())
        truth(x.double()).backward(grad.double())
    for (name, ours), theirs in zip(block.named_parameters(), truth.parameters(), strict=True):
        # Nothing else learns yet: zeros stand between it and the output.
        assert theirs.grad.any() if name.startswith(("fc2", "channel_mul_conv.3")) else not ours.grad.any()
        grid.assert_close(ours.grad, theirs.grad.cpu(), torch.float32, name, sums=150)
    torch.optim.SGD(block.parameters(), 0.1).step()
    assert not torch.equal(block(x), x * beta)
