"""What test_fuzz.py draws, and what it holds the results to: arguments of any strides and values, and the truth in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grid
import numpy as np
import reference
import schema
import torch
from entry import PARAMETERS, Arguments, Formula, Sizes
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from registry import OPERATORS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gcnet_ext.ops import _relu_bits
from gcnet_ext.ops._global_context_arguments import IN_LISTS

WRONG_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex32, torch.float8_e4m3fn, torch.uint16)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-41, -3e-6, 6e4, 3e38, -3e38)
LAYOUTS = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "mkldnn": lambda tensor: tensor.to_sparse() if tensor.is_cuda else tensor.to_mkldnn(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.nan_to_num(), 0.1, 0, torch.qint8),
}


# What hypothesis shrinks to, and tries most often, is the first of each list: the ordinary case.
MOSTLY = st.sampled_from((True, True, True, False))


# ---- tensors -----------------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A tensor as hypothesis draws it: a failing test prints it, and `make` builds it as often as it is needed."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    offset: int = 0
    std: float = 1.0
    special: tuple[float, ...] = ()  # what some of the elements are instead
    seed: int = 0
    kind: str = "strided"  # or "meta", or one of LAYOUTS

    def make(self, to: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        reach = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True) if size)
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(self.offset + max(reach, 0) + 1, generator=generator, dtype=torch.float64) * self.std
        for value in self.special:
            values[torch.rand(values.shape, generator=generator) < 0.1] = value
        if not self.dtype.is_floating_point and not self.dtype.is_complex:
            values = (100 * values).nan_to_num(1).clamp(0, 255)
        tensor = to(values.to(self.dtype)).as_strided(self.sizes, self.strides, self.offset)
        return tensor.to("meta") if self.kind == "meta" else LAYOUTS.get(self.kind, lambda tensor: tensor)(tensor)


@st.composite
def strides(draw: st.DrawFn, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Dense, channels_last, any other order, with gaps, expanded, or overlapping."""
    dims = len(sizes)
    if draw(st.integers(0, 9)) == 9:
        return tuple(draw(st.integers(0, 9)) for _ in sizes)
    natural = tuple(range(dims))
    order = draw(st.sampled_from([natural] * 3 + [(0, *natural[2:], 1)[:dims]] * 3) | st.permutations(natural))
    found, step = [0] * dims, 1
    for dim in reversed(order):
        found[dim] = step * draw(st.sampled_from((1,) * 12 + (2, 0)))
        step = max(step, sizes[dim] * found[dim]) + draw(st.sampled_from((0,) * 9 + (3,)))
    return tuple(found)


@st.composite
def tensors(draw: st.DrawFn, sizes: tuple[int, ...], dtype: torch.dtype, kind: str = "strided") -> Drawn:
    values = draw(st.sampled_from(("normal", "normal", "normal", "special", "scaled")))
    return Drawn(
        sizes,
        draw(strides(sizes)),
        dtype,
        draw(st.integers(0, 5)),
        draw(st.sampled_from((30.0, 1e-3, 1e4, 1e-20, 1e-40, 1e20, 3e38, 0.0))) if values == "scaled" else 1.0,
        tuple(draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=2))) if values == "special" else (),
        draw(st.integers(0, 99)),
        kind,
    )


@st.composite
def wrong_tensors(draw: st.DrawFn) -> Drawn:
    sizes = tuple(draw(st.lists(st.sampled_from((0, 1, 1, 2, 3, 4)), max_size=5)))
    kind = draw(st.sampled_from(("strided", "strided", "meta", *LAYOUTS)))
    if kind in LAYOUTS:
        return draw(tensors((2, *(max(size, 1) for size in sizes[:3])), torch.float32, kind))
    return draw(tensors(sizes, draw(st.sampled_from(grid.FLOATING + WRONG_DTYPES)), kind))


# What is no tensor at all. Made anew for each use, because a call may keep it.
THINGS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a string": lambda: "relu",
    "bytes": lambda: b"relu",
    "True": lambda: True,
    "an int": lambda: 3,
    "a huge int": lambda: 10**400,
    "a float": lambda: 0.25,
    "nan": lambda: math.nan,
    "a complex number": lambda: 1j,
    "an empty list": list,
    "a list of numbers": lambda: [1.0, 2.0],
    "a list of tensors": lambda: [torch.ones(3)] * 6,
    "a dict": dict,
    "an array": lambda: np.ones((2, 3, 4), np.float32),
    "a scalar of numpy": lambda: np.float32(0.5),
    "an object": object,
    "a dtype": lambda: torch.float32,
    "the class": lambda: torch.Tensor,
}


class Thing(NamedTuple):
    name: str

    def make(self, _to: object = None) -> Any:
        return THINGS[self.name]()


NO_TENSOR = st.sampled_from(tuple(THINGS)).map(Thing)
WITH_A_TRUTH_VALUE = NO_TENSOR.filter(lambda thing: thing.name != "an array")
ANYTHING = wrong_tensors() | NO_TENSOR


# ---- calls -------------------------------------------------------------------------------------------------------------------


@st.composite
def good(draw: st.DrawFn, op: str) -> Arguments:
    """Arguments of that operator that fit together, but for sizes of zero and an x that cannot be overwritten."""
    n, c = draw(st.sampled_from((2, 3, 1, 2, 3, 1, 2, 3, 0))), draw(st.sampled_from((5, 3, 1, 2, 4, 6, 7, 8, 9, 16, 33, 65, 0)))
    several = st.lists(st.sampled_from((4, 2, 3, 1, 5, 6, 0)), min_size=1, max_size=4)
    spatial = tuple(draw(several | st.sampled_from((7, 1, 2, 16, 33, 65)).map(lambda size: [size])))
    dtype = draw(st.sampled_from(grid.FLOATING))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    parameter_dtype = draw(st.sampled_from((dtype, torch.float32)))
    operator, found = OPERATORS[op], {}
    names = operator.arguments

    def parameter(name: str, *sizes: int) -> None:
        drawn = draw(tensors(sizes + (1,) * draw(st.sampled_from((0, 0, 0, 2))), parameter_dtype))
        if name.endswith("norm_weight"):  # of an infinite one the gradient is inf - inf or not, by how the sums are written
            drawn = drawn._replace(special=tuple(value for value in drawn.special if not math.isinf(value)))
        found[name] = drawn

    attended = draw(MOSTLY)
    for weight, bias in (("weight", "bias"), ("mask_weight", "mask_bias")):
        if weight in names and attended:
            parameter(weight, *((1, c) if c > 1 and draw(st.booleans()) else (c,)))
            if bias in names and draw(MOSTLY):
                parameter(bias, 1)
    for name in ("gamma", "beta"):
        if name in names:
            parameter(name, c)
    units = {"scale": 0, "shift": 0}
    for branch in units if "scale_w1" in names else ():
        if draw(MOSTLY) or (branch == "shift" and not units["scale"]):
            two_layers = draw(MOSTLY)
            hidden = units[branch] = draw(st.sampled_from((5, 2, 3, 1, 17))) if two_layers else c
            parameter(f"{branch}_w1", hidden, c)
            rest = {"b1": (hidden,), "norm_weight": (hidden,), "norm_bias": (hidden,), "w2": (c, hidden), "b2": (c,)}
            for name, sizes in rest.items() if two_layers else (("b1", (c,)),):
                if name == "w2" or draw(MOSTLY):
                    parameter(f"{branch}_{name}", *sizes)
    for name in ("scale", "shift"):
        if name in names and draw(MOSTLY):
            parameter(name, n, c)
    for name in ("x_scale", "x_shift"):
        if name in names:
            parameter(name, c)
            found[name] = found[name]._replace(special=(), std=1.0)  # finite, as those of a BatchNorm are
    found["x"] = draw(tensors((n, c, *spatial), dtype))
    if "grad" in names:
        found["grad"] = draw(tensors((n, c, *spatial), dtype))
    sizes = Sizes(n, c, math.prod(spatial), attended, sum(units.values()), units["scale"] > 0)
    for name in names:
        if name in operator.saved:
            found[name] = draw(tensors(operator.saved[name](sizes), acc))
        elif name == "residual" and not draw(MOSTLY):
            found[name] = draw(tensors((n, c, *spatial), dtype))
        elif name == "valid" and not draw(MOSTLY):
            found[name] = draw(tensors((draw(st.sampled_from((n, 1))), *spatial), torch.bool))
        elif name.startswith("need_"):
            found[name] = draw(MOSTLY)
        elif name == "eps":  # not 0: the norms of a sample may all be 0
            found[name] = draw(st.sampled_from((1e-6, 1e-3, 1.0)))
        elif name == "norm_eps":  # not 0: where all units are alike the norm would be 0/0, but for a rounding
            found[name] = draw(st.sampled_from((1e-5, None, 1e-5, 1e-3, 1e-12, 1.0)))
        elif name == "activation":
            found[name] = draw(st.sampled_from((1, 2, 3, 4, 5, 6, 0)))
        elif name == "slope":
            found[name] = draw(st.sampled_from((0.01, 0.0, 2.0)))
        elif name == "hard_gate":
            of_hard_gate = st.sampled_from((1 / 6, 0.2, 0.5, 1.0, 0.0, -1.0))
            found[name] = draw(st.none() | st.lists(of_hard_gate, min_size=2, max_size=2))
        elif name == "final_activation":
            found[name] = draw(st.sampled_from((0, 0, 1)))
    if "positive" in names:
        size = _relu_bits.bytes_of(found["x"].make()) if found["final_activation"] and c else 0
        found["positive"] = draw(tensors((n, size), torch.uint8))
    return {name: found.get(name) for name in names}


@st.composite
def calls(draw: st.DrawFn, op: str, keep: Sequence[str] = ()) -> Arguments:
    """Good arguments, one or two of them replaced by anything at all.

    No tensor replaces a number: torch refuses that in words that hold all its elements, and fails at those of a sparse one.
    """
    arguments = draw(good(op))
    names = [name for name in arguments if name not in keep]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        arguments[name] = draw(NO_TENSOR if name in (*schema.OPTIONS, "eps") or name.startswith("need_") else ANYTHING)
    # For both at once torch has no dispatch key that a kernel can have, and so only words of its own.
    assume(not {"quantized", "meta"} <= {value.kind for value in arguments.values() if isinstance(value, Drawn)})
    return arguments


def made(arguments: Arguments, to: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Arguments:
    return {name: value.make(to) if isinstance(value, Drawn | Thing) else value for name, value in arguments.items()}


def has_final_relu(arguments: Arguments) -> bool:
    """Of arguments that the operator has taken: torch makes an int of a float."""
    chosen = arguments.get("final_activation", 0)
    return int(chosen.make() if isinstance(chosen, Thing) else chosen) != 0


def with_masks(arguments: Arguments, x: Tensor) -> Arguments:
    """As the formulas take them: the bits as a mask of the shape of x. A copy of x may lie in memory in another order."""
    if not has_final_relu(arguments) or not torch.is_tensor(arguments.get("positive")):
        return arguments
    return {**arguments, "positive": _relu_bits.unpack(arguments["positive"], x)}


def with_bool(arguments: Arguments) -> Arguments:
    """As the reference takes them: which positions count is no number."""
    valid = arguments.get("valid")
    return {**arguments, "valid": valid != 0} if torch.is_tensor(valid) else arguments


def assert_bits(positive: Tensor, out: Tensor, x: Tensor) -> None:
    """Those of a final ReLU: 1 where the result is above 0 or NaN; where it is 0 it may have been rounded to that."""
    passed, out = _relu_bits.unpack(positive, x).cpu(), out.cpu()
    assert bool((passed | (out == 0)).all())
    assert bool((passed >= ((out > 0) | out.isnan())).all())


def names_an_argument(message: str, names: Sequence[str]) -> bool:
    """In our words, or in those of torch about a schema: nothing else tells a user what to change."""
    any_name = "|".join((*names, *IN_LISTS, "needs"))
    return bool(re.match(rf"(gcnet_ext::\w+: )?({any_name})\b[^,]* must ", message)) or bool(
        re.search(rf"for argument '({any_name})' but instead found type", message)
    )


# ---- the truth ---------------------------------------------------------------------------------------------------------------


class Noise(TorchDispatchMode):
    """Moves every result of every operator that rounds by up to the resolution, and remembers the largest of them."""

    def __init__(self, resolution: float, seed: int) -> None:
        super().__init__()
        self.resolution, self.generator, self.largest = resolution, torch.Generator().manual_seed(seed), 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A maximum is one of its arguments: with other noise than those a softmax of huge logits would be NaN.
        rounds = func != torch.ops.aten.amax.default
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        return tree_map_only(Tensor, self.noisy, result) if rounds and not is_view else result

    def noisy(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float64 or tensor.numel() == 0:
            return tensor
        self.largest = max(self.largest, float(tensor.nan_to_num(0, 0, 0).abs().max()))
        noise = torch.rand(tensor.shape, generator=self.generator, dtype=tensor.dtype) * 2 - 1
        return tensor * (1 + self.resolution * noise)


def _in(dtype: torch.dtype, arguments: Arguments) -> Arguments:
    """Every tensor dense and in the dtype."""
    return {
        name: value.detach().cpu().to(dtype).contiguous() if torch.is_tensor(value) else value
        for name, value in arguments.items()
    }


class Truth:
    """A formula's results in float64, and what they may become when every step is a few roundings off.

    The second comes from the model, whose steps are those of the formula: in the dtype that sums are taken in, and with noise.
    """

    def __init__(self, formula: Formula, model: Formula, arguments: Arguments, acc: torch.dtype) -> None:
        self.model, self.arguments, self.acc = model, _in(torch.float64, arguments), acc
        self.exact = formula(self.arguments)
        self.inexact = [model(_in(acc, arguments))]
        self.largest = 0.0  # number on the way to the results
        for _ in range(3):
            self.look_again()

    def look_again(self) -> None:
        """With other noise."""
        with Noise(4 * torch.finfo(self.acc).eps, len(self.inexact)) as noise:
            inexact = {name: noise.noisy(value) if torch.is_tensor(value) else value for name, value in self.arguments.items()}
            self.inexact.append(self.model(inexact))
        self.largest = max(self.largest, noise.largest)

    def explains(self, got: Tensor, index: int) -> str:
        """Empty where formula and models explain every element of that output, otherwise words about the first they do not.

        A finite one must be as close to the formula's as rounding decides. Where formula and models differ in kind (finite,
        infinity, -infinity, NaN), rounding decides about that, and each of their kinds is right, but no other.
        """
        limits = torch.finfo(got.dtype)
        shown = torch.stack([results[index].double() for results in (self.exact, *self.inexact)])
        finite, above, below, nan = _kinds(shown).any(1)
        nan = nan | (above & below)  # of an infinite factor and one of either sign, which may then be zero as well
        numbers = shown.masked_fill(~shown.isfinite(), math.nan)
        value = numbers[0].where(~numbers[0].isnan(), numbers.nanmedian(0).values).nan_to_num(0)
        spread = (numbers - value).abs().nan_to_num(0).amax(0)
        spread = spread.amax(tuple(range(2, spread.dim())), keepdim=True) if spread.dim() > 2 else spread
        bound = 0.51 * (limits.eps if got.dtype != self.acc else 0) * value.abs() + limits.smallest_normal * limits.eps
        bound = bound + 60 * torch.finfo(self.acc).eps * value.abs() + 30 * spread
        bound = bound + 4 * torch.finfo(self.acc).tiny * max(self.largest, 1.0)
        above, below = above | (finite & (value + bound >= limits.max)), below | (finite & (bound - value >= limits.max))
        close = finite & ((got.double() - value).abs() <= bound)
        right = (_kinds(got) & torch.stack([close, above, below, nan])).any(0)
        bad = (~right).flatten().nonzero().flatten()
        if not len(bad):
            return ""
        first = int(bad[0])
        kinds = [float(each.flatten()[first]) for each in shown]
        return (
            f"{len(bad)} of {got.numel()} elements, element {first} is {got.flatten()[first].item()}, expected {kinds[0]} +- "
            f"{bound.expand_as(value).flatten()[first].item():.3g}, inexact {sorted(set(kinds[1:]))}"
        )


def _kinds(tensor: Tensor) -> Tensor:
    """Whether each element is finite, infinity, -infinity, NaN: four answers, of which one is yes."""
    return torch.stack([tensor.isfinite(), tensor == math.inf, tensor == -math.inf, tensor.isnan()])


def assert_true(got: Tensor, index: int, truth: Truth) -> None:
    """What the truth explains; before an element is called wrong, it is looked at again and again, for what chance left out."""
    want = truth.exact[index]
    assert got.shape == want.shape, f"output {index}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if got.numel() == 0:
        return
    got = got.detach().cpu()
    while True:
        if 100 * truth.largest > torch.finfo(truth.acc).max:  # in that dtype something may overflow on the way
            return
        words = truth.explains(got, index)
        if not words:
            return
        assert len(truth.inexact) < 32, f"output {index}: {words}"
        truth.look_again()


# ---- what may happen ---------------------------------------------------------------------------------------------------------


def examples(count: int) -> settings:
    """So many in a CI run, and as many more as another profile asks for."""
    scaled = count * settings.default.max_examples // settings.get_profile("gcnet_ext").max_examples
    return settings(max_examples=scaled, suppress_health_check=list(HealthCheck))


def outcome(call: Callable[[], Any]) -> tuple[Tensor, ...] | Exception:
    """What the call returned, or one of the three exceptions that it may raise."""
    try:
        found = call()
    except (RuntimeError, TypeError, ValueError) as error:
        return error
    return schema.opened(found) if isinstance(found, tuple) else (found,)


def refused(found: object, names: tuple[str, ...], *, sound: bool) -> bool:
    """Whether there was an exception; it must name an argument, and there must be none when all was sound."""
    if not isinstance(found, Exception):
        return False
    assert not sound, f"refused: {found}"
    assert names_an_argument(str(found), names), f"{type(found).__name__}: {found}"
    return True


def copies(arguments: Arguments) -> Arguments:
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in arguments.items()}


def without_replaced(arguments: Arguments, options: Arguments) -> Arguments:
    """The arguments of an operator, where options of the function stand in their place: those are used, whatever these were."""
    branches = [name for name in ("scale", "shift") if name in options]
    weights = {f"{branch}_{parameter}": None for branch in branches for parameter in PARAMETERS}
    return arguments | weights | {name: value for name, value in options.items() if name in arguments}


def bits(tensor: Tensor) -> Tensor:
    """As bytes, for NaN to equal NaN; a copy, as a single element may have a stride of zero."""
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def plain(arguments: Arguments) -> Arguments:
    """Options as an operator converts them."""
    plain = {name: bool(value) if name.startswith("need_") else value for name, value in arguments.items()}
    for name in ("activation", "final_activation"):
        if name in plain:
            plain[name] = int(plain[name])
    if plain.get("hard_gate") is not None:
        plain["hard_gate"] = [float(value) for value in plain["hard_gate"]]
    return {name: int(value) if name == "activation" else value for name, value in plain.items()}


def compare(
    found: tuple[Tensor, ...],
    formula: Formula,
    arguments: Arguments,
    model: Formula | None = None,
    acc: torch.dtype | None = None,
) -> None:
    """Every output with the formula's, on the arguments as they were; `acc` is the dtype of the sums, by default that of x."""
    arguments = plain(arguments)
    if arguments["x"].is_meta:
        assert all(got.is_meta for got in found)
        return
    acc = acc or reference.accumulation_dtype(arguments["x"])
    truth = Truth(formula, model or formula, arguments, acc)
    for index, (got, want) in enumerate(zip(found, truth.exact, strict=True)):
        if want is None:
            assert got.shape == (0,), f"output {index} was not asked for"
        else:
            assert_true(got, index, truth)
