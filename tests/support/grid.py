"""What the test files share: shapes, dtypes, layouts, random inputs, and the comparison with the float64 reference.

An op is called with a flat tuple of tensors (None where one is missing), in the order of csrc/ops.cpp, so that one function can
randomise, differentiate and compare any of them. Every parameter is random: with its initial weights the block is the identity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import reference
import torch
from torch import Tensor

from gcnet_ext import Branch

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
CHANNELS = (1, 3, 64, 100, 2048)
HIDDEN = (1, 4, 128)
# Positions, as one, two and three spatial dimensions
SPATIAL = {
    1: ((1,), (1, 1), (1, 1, 1)),
    3: ((3,), (3, 1), (1, 3, 1)),
    49: ((49,), (7, 7), (7, 1, 7)),
    50: ((50,), (5, 10), (2, 5, 5)),
    1056: ((1056,), (32, 33), (4, 8, 33)),
}
FUSIONS = ("mul", "add", "both")
POOLINGS = ("att", "avg")
GLOBAL_CONTEXT_INPUTS = (
    "x",
    "mask_weight",
    "mask_bias",
    *(
        f"{branch}_{parameter}"
        for branch in ("scale", "shift")
        for parameter in ("w1", "b1", "norm_weight", "norm_bias", "w2", "b2")
    ),
)  # fmt: skip


# ---- layouts -----------------------------------------------------------------------------------------------------------------
# Each takes a function that makes a dense tensor, and returns a view of one with the sizes [n, c, *s].

LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda make, n, c, *s: make(n, c, *s),
    "channels_last": lambda make, n, c, *s: make(n, *s, c).movedim(-1, 1),
}
VIEWS: dict[str, Callable[..., Tensor]] = {
    "cropped": lambda make, n, c, *s: make(n, c, *s[:-1], s[-1] + 3)[..., : s[-1]],
    "cropped_channels_last": lambda make, n, c, *s: make(n, *s[:-1], s[-1] + 3, c).movedim(-1, 1)[..., : s[-1]],
    "every_other_channel": lambda make, n, c, *s: make(n, 2 * c, *s)[:, ::2],
    "every_other_channel_of_channels_last": lambda make, n, c, *s: make(n, *s, 2 * c).movedim(-1, 1)[:, ::2],
    "every_other_sample": lambda make, n, c, *s: make(2 * n, c, *s)[::2],
    "every_other_column": lambda make, n, c, *s: make(n, c, *s[:-1], 2 * s[-1])[..., ::2],
    "channel_slice": lambda make, n, c, *s: make(n, c + 5, *s)[:, 3 : 3 + c],
    "channel_slice_of_channels_last": lambda make, n, c, *s: make(n, *s, c + 5).movedim(-1, 1)[:, 3 : 3 + c],
    "samples_inside": lambda make, n, c, *s: make(c, n, *s).transpose(0, 1),
    "spatial_transposed": lambda make, n, c, *s: make(n, c, *s[::-1]).permute(0, 1, *reversed(range(2, 2 + len(s)))),
    "expanded_samples": lambda make, n, c, *s: make(1, c, *s).expand(n, c, *s),
    "expanded_channels": lambda make, n, c, *s: make(n, 1, *s).expand(n, c, *s),
    "expanded_positions": lambda make, n, c, *s: make(n, c, *(1 for _ in s)).expand(n, c, *s),
    "unaligned": lambda make, n, c, *s: make(n * c * math.prod(s) + 1)[1:].view(n, c, *s),
    "unaligned_channels_last": lambda make, n, c, *s: make(n * c * math.prod(s) + 1)[1:].view(n, *s, c).movedim(-1, 1),
}
EVERY_LAYOUT = {**LAYOUTS, **VIEWS}


# ---- random inputs -----------------------------------------------------------------------------------------------------------


class Random:
    """Random tensors of one seed, made on the CPU (the same numbers for every backend) and moved by `to`."""

    def __init__(self, seed: int = 0, to: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.to = to

    def normal(self, *sizes: int, dtype: torch.dtype = torch.float32, std: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(sizes, generator=self.generator, dtype=torch.float64) * std + mean
        return self.to(values.to(dtype))

    def feature_map(self, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
        """x or a gradient of its shape. The mean is not zero, so that neither is the context."""
        return EVERY_LAYOUT[layout](lambda *sizes: self.normal(*sizes, dtype=dtype, mean=0.25), *shape)

    def mask(self, channels: int, dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """Weights that make the attention neither flat nor one-hot."""
        weight = self.normal(channels, dtype=dtype, std=1.5 / math.sqrt(channels))
        return weight, self.normal(1, dtype=dtype) if bias else None

    def branch(self, channels: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """w1, b1, norm_weight, norm_bias, w2, b2."""
        return (
            self.normal(hidden, channels, dtype=dtype, std=2 / math.sqrt(channels)),
            self.normal(hidden, dtype=dtype),
            self.normal(hidden, dtype=dtype, mean=0.5),
            self.normal(hidden, dtype=dtype, std=0.5, mean=0.5),
            self.normal(channels, hidden, dtype=dtype, std=1.5 / math.sqrt(hidden)),
            self.normal(channels, dtype=dtype),
        )


def scattered(shape: tuple[int, ...]) -> Tensor:
    """Positions that count, for a map of this shape: the first of every sample, and of several samples none in the last."""
    valid = Random(3).normal(shape[0], *shape[2:]) > 0.3
    valid.flatten(1)[:, 0] = True
    valid[1:][-1:] = False
    return valid


class Case(NamedTuple):
    """One call of the whole block: sizes, layout, dtypes and which of the parts are there."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    pooling: str = "att"
    fusion: str = "both"
    hidden: int = 4
    parameter_dtype: torch.dtype | None = None
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        short = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
        dtypes = short[self.dtype] + (f"+{short[self.parameter_dtype]}" if self.parameter_dtype else "")
        sizes = "x".join(str(size) for size in self.shape)
        missing = "-no-" + "-".join(self.missing) if self.missing else ""
        return f"{sizes}-{dtypes}-{self.layout}-{self.pooling}-{self.fusion}-h{self.hidden}{missing}"

    def inputs(self, to: Callable[[Tensor], Tensor] = lambda tensor: tensor, seed: int = 0) -> tuple[Tensor | None, ...]:
        """The fifteen tensors of global_context."""
        random = Random(seed, to)
        dtype = self.parameter_dtype or self.dtype
        channels = self.shape[1]
        x = random.feature_map(self.shape, self.dtype, self.layout)
        mask = random.mask(channels, dtype) if self.pooling == "att" else (None, None)
        scale = random.branch(channels, self.hidden, dtype) if self.fusion != "add" else (None,) * 6
        shift = random.branch(channels, self.hidden, dtype) if self.fusion != "mul" else (None,) * 6
        tensors = (x, *mask, *scale, *shift)
        return tuple(None if name in self.missing else t for name, t in zip(GLOBAL_CONTEXT_INPUTS, tensors, strict=True))

    @property
    def vanishing(self) -> tuple[str, ...]:
        """The inputs whose gradient is zero in exact arithmetic: softmax and LayerNorm ignore what shifts all they get alike.

        One position, or positions all alike, leave the attention nothing to choose; the LayerNorm of one unit is constant.
        """
        names = ["mask_bias"]
        if math.prod(self.shape[2:]) == 1 or self.layout == "expanded_positions" or self.hidden == 1:
            names.append("mask_weight")
        if self.hidden == 1:
            names += [f"{branch}_{name}" for branch in ("scale", "shift") for name in ("w1", "b1", "norm_weight")]
        return tuple(names)

    @property
    def sums(self) -> float:
        """How many resolutions gradients may be off. The LayerNorm of one unit divides what should cancel by sqrt(eps)."""
        return 150 / math.sqrt(1e-5) if self.hidden == 1 else 150


def combinations() -> list[Case]:
    """Every dtype, layout, pooling and fusion together, at one small odd shape."""
    return [
        Case((2, 10, 7, 7), *choice) for choice in itertools.product(FLOATING, LAYOUTS, POOLINGS, FUSIONS)
    ]  # fmt: skip


def sizes() -> list[Case]:
    """Every number of channels with every number of positions; the rest takes turns."""
    cases = []
    for index, (channels, positions) in enumerate(itertools.product(CHANNELS, SPATIAL)):
        for turn in (index, index + 1):  # twice, in the two layouts
            samples = 1 if channels * positions > 10**6 else 3
            cases.append(
                Case(
                    (samples, channels, *SPATIAL[positions][turn % 3]),
                    dtype=FLOATING[(3 * index + turn) % 4],
                    layout=tuple(LAYOUTS)[turn % 2],
                    pooling="avg" if turn % 7 == 3 else "att",
                    fusion=FUSIONS[(turn + index // 5) % 3],
                    hidden=HIDDEN[(turn + index // 5 + 1) % 3],
                )
            )
    return cases


def large() -> list[Case]:
    """More positions than a tile, or than 64 of them."""
    shapes = ((1, 1, 300_001), (2, 3, 131, 97), (1, 300, 4099), (1, 2, 511, 601))
    return [
        Case(shape, FLOATING[(index + turn + 1) % 4], layout, fusion=FUSIONS[(index + turn) % 3], hidden=(3, 128)[turn])
        for index, shape in enumerate(shapes)
        for turn, layout in enumerate(LAYOUTS)
    ]


def groups() -> list[Case]:
    """More bytes than samples that are worked on together, with weights for one thread and for several."""
    return [Case((7, 512, 28, 27), layout=layout, hidden=hidden) for layout, hidden in zip(LAYOUTS, (128, 3), strict=True)]


def views() -> list[Case]:
    """Every strided view, in each dtype's turn."""
    shapes = ((3, 20, 5, 9), (2, 64, 49), (2, 7, 3, 4, 5))
    return [
        Case(shapes[(index + turn) % 3], FLOATING[(index + 2 * turn) % 4], view, fusion=FUSIONS[(index + turn) % 3])
        for turn in range(3)
        for index, view in enumerate(VIEWS)
    ]


def distinct(cases: Sequence[Case], **fixed: Any) -> list[Case]:
    """The cases that still differ when these fields do not matter."""
    return list(dict.fromkeys(case._replace(**fixed) for case in cases))


# ---- calling, differentiating, comparing -------------------------------------------------------------------------------------


def flat(global_context: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """global_context as a function of its fifteen tensors."""

    def call(x: Tensor, mask_weight: Tensor | None, mask_bias: Tensor | None, *branches: Tensor | None) -> Tensor:
        scale, shift = (None if branch[0] is None else Branch(*branch) for branch in (branches[:6], branches[6:]))
        return global_context(x, mask_weight, mask_bias, scale, shift, **options)

    return call


class Result(NamedTuple):
    """The output of a differentiable call and the gradient of every input, None where there is no input."""

    out: Tensor
    grads: tuple[Tensor | None, ...]


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor | None = None) -> Result:
    """Forward, and backward from `grad` (ones, expanded, when it is None) to every input."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(out.sum(), given) if grad is None else torch.autograd.grad(out, given, grad)
    each = iter(found)
    return Result(out.detach(), tuple(None if leaf is None else next(each) for leaf in leaves))


def exact(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor | None = None) -> Result:
    """The same on the float64 values of the same stored numbers, on the CPU: the ground truth."""
    inputs = [None if tensor is None else tensor.detach().cpu().double() for tensor in inputs]
    return run(function, inputs, None if grad is None else grad.cpu().double())


def error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    return float((got.detach().cpu().double() - want).norm() / want.norm().clamp(min=1e-30))


def assert_close(
    got: Tensor, want: Tensor, accumulated_in: torch.dtype, what: str = "result", *, sums: float = 60, largest: float = 0.0
) -> None:
    """Element by element and in norm: one rounding to the dtype of `got`, and the errors of sums in the accumulation dtype.

    The error of a sum scales with its terms and not with its result, so the second part is measured by the largest element
    of `want`, or by `largest` where that is larger: `sums` times the resolution of the dtype in which the sums are taken.
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    rounding = torch.finfo(got.dtype).eps / 2 if got.dtype != accumulated_in else 0.0
    difference = (got.detach().cpu().double() - want).abs()
    summed = sums * torch.finfo(accumulated_in).eps * max(float(want.abs().max()), largest)
    bound = 1.01 * rounding * want.abs() + summed
    worst = int((difference / bound).nan_to_num(math.inf).argmax())
    assert bool((difference <= bound).all()), (
        f"{what}: element {worst} is {got.flatten()[worst].item()}, expected {want.flatten()[worst].item()} "
        f"+- {bound.flatten()[worst].item():.3g}"
    )
    # Many errors of both signs stay, in norm, well below the bound of the worst of them. Equal numbers have equal errors.
    if len(want.flatten()[:: want.numel() // 4096 + 1].unique()) < 64:
        return
    norm, norm_bound = float(difference.norm()), 0.7 * rounding * float(want.norm()) + 0.5 * summed * math.sqrt(want.numel())
    assert norm <= norm_bound, f"{what}: the error is {norm:.3g} in norm, the bound {norm_bound:.3g}"


def accumulation(x: Tensor) -> torch.dtype:
    return reference.accumulation_dtype(x)


def check(
    function: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor | None,
    names: Sequence[str],
    *,
    vanishing: Collection[str] = ("mask_bias",),
    sums: float = 150,
) -> Result:
    """Compares output and gradients with the float64 reference; the gradients are of their inputs' shapes and dtypes.

    A gradient that vanishes in exact arithmetic is measured by its terms: products over the channels with the largest of the
    others, the one of the output included.
    """
    got, want = run(function, inputs, grad), exact(truth, inputs, grad)
    x = inputs[0]
    assert got.out.dtype == x.dtype
    assert_close(got.out, want.out, accumulation(x), "out")
    gradients = [true for true in (grad, *want.grads) if true is not None and true.numel()]
    largest = max((float(gradient.abs().max()) for gradient in gradients), default=0.0)
    for name, tensor, ours, true in zip(names, inputs, got.grads, want.grads, strict=True):
        if tensor is not None:
            assert (ours.dtype, ours.device) == (tensor.dtype, tensor.device)
            floor = largest * math.sqrt(x.shape[1]) if name in vanishing else 0.0
            assert_close(ours, true, accumulation(x), f"gradient of {name}", sums=sums, largest=floor)
    return got


def memory_format_kept(out: Tensor, x: Tensor) -> bool:
    """Whether out is dense in the order of x: channels innermost for channels_last, else contiguous."""
    if x.shape[1] > 1 and x.stride(1) == 1 and math.prod(x.shape[2:]) > 1:
        return out.movedim(1, -1).is_contiguous()
    return out.is_contiguous()


def gradcheck(function: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> bool:
    """torch.autograd.gradcheck by finite differences; it raises when a gradient is wrong or changes from run to run."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.gradcheck(function, leaves)


def check_needs(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor, needs: Sequence[bool]) -> None:
    """A gradient where one is needed, the same as when all are; None elsewhere."""
    every = run(function, inputs, grad)
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(bool(need))
        for tensor, need in zip(inputs, needs, strict=True)
    ]
    out = function(*leaves)
    assert torch.equal(out, every.out)
    assert out.requires_grad == any(leaf is not None and leaf.requires_grad for leaf in leaves)
    if out.requires_grad:
        out.backward(grad)
    for index, (leaf, need) in enumerate(zip(leaves, needs, strict=True)):
        if leaf is not None:
            assert (leaf.grad is not None) == need, f"input {index}"
            if need:
                assert torch.equal(leaf.grad, every.grads[index]), f"input {index}"


def available_memory() -> int:
    """Bytes that can be had without swapping: of the machine, and of the container that the tests run in."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no such file, or "max": no limit
        pass
    return free
