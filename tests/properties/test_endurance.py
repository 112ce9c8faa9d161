"""Ten thousand calls leave nothing behind, threads do not pile up, and no byte beside the outputs changes."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grid
import pytest
import torch
from calls import operator_arguments
from grid import Case
from registry import IN_PLACE, OPERATORS, OPS
from torch import Tensor

import gcnet_ext

# ---- calls -------------------------------------------------------------------------------------------------------------------


def steps(case: Case) -> dict[str, Callable[[], object]]:
    """Forward and backward of every function and of the module, and the operators that overwrite x."""
    block = gcnet_ext.GlobalContextBlock(case.shape[1], 1 / 4, fusion_types=("channel_mul", "channel_add"), dtype=case.dtype)
    x = case.inputs()[0]
    leaf = x.clone().requires_grad_()
    parameters = list(block.parameters())

    def both(function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> Callable[[], object]:
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        given = [leaf for leaf in leaves if leaf is not None]
        return lambda: torch.autograd.grad(function(*leaves).sum(), given)

    overwriting = [(op.flat(functools.partial(op.function, inplace=True)), op.inputs_of(case)[1:]) for op in IN_PLACE.values()]

    def in_place() -> None:
        with torch.no_grad():
            x.fill_(1)  # it would grow from call to call
            for function, weights in overwriting:
                function(x, *weights)

    return {
        **{name: both(op.ours, op.inputs_of(case)) for name, op in OPS.items()},
        "in place": in_place,
        "module": lambda: torch.autograd.grad(block(leaf).sum(), [leaf, *parameters]),
    }


# ---- memory and threads ------------------------------------------------------------------------------------------------------

FLAT = """
import gc, os, torch
from grid import Case
from test_endurance import steps

def resident():
    gc.collect()
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * os.sysconf("SC_PAGESIZE")

torch.set_num_threads(2)
step = steps(Case((2, 16, 4, 4)))["{name}"]
for _ in range(2_000):
    step()
before = resident()
for _ in range(10_000):
    step()
print(resident() - before)
"""


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", [*OPS, "in place", "module"])
def test_resident_memory_is_flat(python, name):
    """One block of the smallest size per call would be 320 KB; what is not there to a byte is for test_memory.py."""
    grown = int(python(FLAT.format(name=name)).stdout)
    assert grown < 160 * 1024


THREADS = """
import os, threading, time, torch
from concurrent.futures import ThreadPoolExecutor
from grid import Case
from test_endurance import steps

every = [step for name, step in steps(Case((3, 64, 24, 25))).items() if name != "in place"]  # x must be one caller's

def calls():
    for step in every:
        step()

def settled():
    # a thread that was joined may take a moment to leave /proc
    counts = []
    while len(counts) < 200 and counts[-20:].count(counts[-1] if counts else 0) < 20:
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.001)
    return counts[-1]

found = []
with ThreadPoolExecutor(3) as pool:
    for _ in range(12):
        for number in (1, 2, 5, 3, 4):
            torch.set_num_threads(number)
            calls()
            list(pool.map(lambda _: calls(), range(6)))
        passing = [threading.Thread(target=calls) for _ in range(3)]
        for thread in passing:
            thread.start()
        for thread in passing:
            thread.join()
        found.append(settled())
print(*found)
"""


@pytest.mark.usefixtures("kernels")
def test_threads_do_not_pile_up(python):
    """After a few rounds of changing numbers of threads, from lasting and from passing Python threads, there are no more."""
    found = [int(count) for count in python(THREADS).stdout.split()]
    assert max(found[4:]) <= max(found[:4]), found


# ---- guarded memory ----------------------------------------------------------------------------------------------------------
# Every tensor lies in a buffer of its own between guards, and what a view skips (the ends of rows, every other channel) is
# guarded, too. All ones: NaN in every dtype, so that reading a guard shows as well.
#
# Memory that an operator allocates itself starts as NaN here, so that what it does not write shows; a write past its end is
# seen by glibc, below, at its next byte. Any other access out of bounds, scratch memory included, is for AddressSanitizer: the
# C++ tests run the kernels of the CPU and of CUDA under it (make test-native).

GUARD = 64  # elements; a multiple of 16 bytes, so that alignment is as without
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHAPES = ((2, 20, 7, 9), (2, 70, 33, 40))  # less than a vector of any kind, and enough for several threads


class Guarded:
    """A tensor in a buffer of its own."""

    def __init__(self, values: Tensor, layout: str, to: Callable[[Tensor], Tensor]) -> None:
        self.bits = torch.empty(0)

        def make(*sizes: int) -> Tensor:
            count = math.prod(sizes)
            self.bits = to(torch.full((count + 2 * GUARD,), -1, dtype=BITS[values.dtype]))
            return self.bits.view(values.dtype)[GUARD : GUARD + count].view(sizes)

        self.tensor = grid.EVERY_LAYOUT[layout](make, *values.shape)
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in self.tensor.stride())
        self.tensor[once] = values[once]
        self.before = self.bits.clone()

    def assert_unchanged(self, but_for: Tensor | None, what: str) -> None:
        """Bit for bit, or with these values in the tensor."""
        if but_for is not None:
            place = self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
            self.before.view(self.tensor.dtype).as_strided(*place).copy_(but_for)
        changed = (self.bits != self.before).nonzero().flatten() - GUARD
        assert not len(changed), f"{what}: {len(changed)} elements of the buffer, from {changed[0]} to {changed[-1]}"


def guarded(value: Any, layout: str, to: Callable[[Tensor], Tensor]) -> Any:
    """A map in its layout, a matrix with a guard behind every row, a vector; what is no tensor as it is."""
    if not torch.is_tensor(value) or value.numel() == 0:
        return value
    if value.dim() > 2:
        return Guarded(value, layout, to)
    found = Guarded(value.reshape(1, -1, value.shape[-1]), "cropped", to)
    found.tensor = found.tensor[0] if value.dim() == 2 else found.tensor[0, 0]
    return found


def outputs(found: Any) -> tuple[Tensor, ...]:
    return (found,) if torch.is_tensor(found) else found or ()


def check_guards(ops: Any, op: str, case: Case, to: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    plain = operator_arguments(ops, op, case, to)
    memory = {name: guarded(value, case.layout, to) for name, value in plain.items()}
    call = getattr(ops, op)
    got = outputs(call(*(value.tensor if isinstance(value, Guarded) else value for value in memory.values())))
    want = outputs(call(*plain.values()))
    for name, value in memory.items():
        if isinstance(value, Guarded):
            value.assert_unchanged(plain["x"] if op.endswith("_") and name == "x" else None, f"{name} of {case}")
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert theirs.isfinite().all(), f"output {index} of {case} is not finite: an element was not written, or is NaN"
        assert torch.equal(ours, theirs), f"output {index} of {case}: a guard was read"


def guard_cases(layout: str, shapes: Sequence[tuple[int, ...]]) -> list[Case]:
    """Every dtype in the first shape, and one of 4 and one of 2 bytes in the others."""
    cases = [Case(shapes[0], dtype, layout) for dtype in grid.FLOATING]
    return cases + [Case(shape, dtype, layout) for dtype in (torch.float32, torch.bfloat16) for shape in shapes[1:]]


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
@pytest.mark.parametrize("op", OPERATORS)
def test_nothing_else_is_written(backend, op, layout):
    if op.endswith("_") and layout.startswith("expanded"):
        pytest.skip("refused: x shares memory among its elements")
    for case in guard_cases(layout, SHAPES[: 1 if backend.name == "cuda-emulated" else 2]):
        check_guards(backend.ops, op, case, backend.to)


MALLOC = """
import backends, ctypes, torch
from test_endurance import OPERATORS, SHAPES, check_guards, guard_cases

if {overrun}:
    tensor = torch.empty(1001, dtype=torch.uint8)
    behind = ctypes.c_ubyte.from_address(tensor.data_ptr() + tensor.nbytes)
    behind.value ^= 0xff  # another one than glibc's, which depends on the address
    del tensor
for op in OPERATORS:
    for layout in ("contiguous", "channels_last", "cropped", "every_other_column"):
        for case in guard_cases(layout, SHAPES):
            check_guards(backends.Backend("cpu").ops, op, case)
print("the end")
"""


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("overrun", [True, False])
def test_nothing_is_written_past_the_end_of_an_allocation(python, overrun):
    """glibc puts a byte behind every block, outputs and scratch alike, and looks at it when the block is freed."""
    try:
        ctypes.CDLL("libc_malloc_debug.so.0")
    except OSError:
        pytest.skip("needs libc_malloc_debug.so.0 of glibc 2.34")
    checks = {"LD_PRELOAD": "libc_malloc_debug.so.0", "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    done = python(MALLOC.format(overrun=overrun), check=False, **checks)
    if overrun:
        assert "invalid pointer" in done.stderr
    else:
        assert done.stdout.strip() == "the end", done.stderr
