"""The machine code of the CUDA kernels, read with cuobjdump: no GPU is needed to see what a kernel will do on one.

The library is the one beside gcnet_ext, or the one that GCNET_EXT_CUDA_LIBRARY names.
"""

from __future__ import annotations

import functools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import machine_code
import pytest

import gcnet_ext

ALL_ARCHITECTURES = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
# These go through the big tensors.
HOT = re.compile(r"attention_pool|fuse_|sums_|response_gradient<")
STAGE = re.compile(r"transform_(hidden_parts|outputs|grad_parts|grad_context)<")
ITEMS = re.compile(r"\w+_(items|flat\w*)<")
TICKETS = re.compile(r"\w+_tickets<.*, (\d+)>+$")  # the threads of the tile: 512 are two blocks of a cluster
BYTES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2}
# Elements per access are the first or second number of the template arguments.
ACCESS = re.compile(r"<(?P<dtype>\w+), (?:RowShape<)?(?P<vector>\d+)")
ROWS = re.compile(r"RowShape<\d+, \d+, (\d+), \d+>")
POSITIONS_PER_WARP = 8  # kCudaPositionsPerWarp
SWEEP_UNROLL = 4  # kCudaSweepUnroll


@pytest.fixture(scope="module")
def library() -> Path:
    named = os.environ.get("GCNET_EXT_CUDA_LIBRARY")
    beside = sorted(Path(gcnet_ext.__file__).parent.glob("libgcnet_ext_cuda.so"))
    if not named and not beside:
        pytest.skip("this build has no CUDA library, and GCNET_EXT_CUDA_LIBRARY names none")
    if machine_code.find_cuobjdump() is None:
        pytest.skip("there is no cuobjdump: it is in the CUDA toolkit and in the triton wheel")
    return Path(named) if named else beside[0]


@pytest.fixture(scope="module")
def resources(library):
    return machine_code.resources(library)


@pytest.fixture(scope="module")
def instructions(library):
    architectures = sorted(machine_code.architectures(library))
    with ThreadPoolExecutor() as pool:
        found = pool.map(functools.partial(machine_code.instructions, library), architectures)
        return dict(zip(architectures, found, strict=True))


class Accesses(NamedTuple):
    """What a thread loads at once, and for some kernels stores, by the numbers that the plan put into the template."""

    bits: int
    count: int


def wide_accesses(kernel: str) -> Accesses | None:
    match = ACCESS.search(kernel)
    bits = 8 * int(match["vector"]) * BYTES[match["dtype"]] if match else 0
    if bits < 64 or "double" in kernel:
        return None
    if kernel.startswith("response_gradient<"):
        return Accesses(bits, 2)  # of g and x
    if rows := ROWS.search(kernel):
        return Accesses(bits, int(rows.group(1)))
    return Accesses(bits, POSITIONS_PER_WARP if "attention_pool" in kernel else SWEEP_UNROLL)


def test_every_architecture(library):
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted is None:
        assert machine_code.architectures(library) >= ALL_ARCHITECTURES
        assert machine_code.ptx(library)
        return
    numbers = re.findall(r"(\d+)\.(\d+)", wanted)
    assert machine_code.architectures(library) == {f"sm_{major}{minor}" for major, minor in numbers}
    assert bool(machine_code.ptx(library)) == ("PTX" in wanted)


def test_every_kernel_on_every_architecture(library, resources):
    assert len(resources) > 50
    for kernel, of in resources.items():
        assert set(of) == machine_code.architectures(library), kernel


def test_no_stack_frame_where_it_is_hot(resources):
    """Neither arrays that are indexed at run time nor more spilled registers than four that no inner loop needs.

    (float64 is for checking gradients.)
    """
    frames = [
        f"{kernel} on {arch}: {used.stack} bytes"
        for kernel, of in sorted(resources.items())
        for arch, used in sorted(of.items())
        if HOT.match(kernel) and "double" not in kernel and used.stack > 16
    ]
    assert not frames, "\n".join(frames)


def test_the_stages_of_the_transform(resources, instructions):
    """csrc/cuda/transform_split*.cuh: nothing spilled, what the launch before wrote read past the first-level cache, and from
    sm_90 on a wait for that launch (griddepcontrol.wait is ACQBULK)."""
    stages = [kernel for kernel in resources if STAGE.match(kernel)]
    assert len(stages) == 3 * 6
    for arch, kernels in instructions.items():
        for kernel in stages:
            assert resources[kernel][arch].registers <= 128, f"{kernel} on {arch}"
            assert resources[kernel][arch].stack == 0, f"{kernel} on {arch}"
            assert any("STRONG" in name for name in kernels[kernel] if name.startswith("LDG")), f"{kernel} on {arch}"
            waits = any(name.startswith("ACQBULK") for name in kernels[kernel])
            assert waits == (int(arch.removeprefix("sm_")) >= 90), f"{kernel} on {arch}"


def test_the_kernels_that_walk_items(resources, instructions):
    """csrc/cuda/items.cuh: from sm_80 on, values come to shared memory in copies of 16 bytes, and no one waits at once. With
    at most 128 registers a thread, enough blocks run at a time. Nothing is spilled, but for two registers before sm_80."""
    items = [kernel for kernel in resources if ITEMS.match(kernel)]
    assert len(items) >= 50
    for arch, kernels in instructions.items():
        for kernel in items:
            assert resources[kernel][arch].registers <= 128, f"{kernel} on {arch}"
            assert resources[kernel][arch].stack <= (8 if arch == "sm_75" else 0), f"{kernel} on {arch}"
            copies = sum(count for name, count in kernels[kernel].items() if name.startswith("LDGSTS.E.BYPASS.128"))
            assert (copies > 0) == (int(arch.removeprefix("sm_")) >= 80), f"{kernel} on {arch}: {copies} copies"


def test_the_kernels_with_tickets(resources, instructions):
    """csrc/cuda/tickets.cuh: what walks items, too. Where has_tickets() says no, the kernels are empty.

    What other blocks have left is read past the first-level cache, and so are the counters for which a block waits.
    """
    tickets = [kernel for kernel in resources if TICKETS.match(kernel)]
    assert len(tickets) >= 15
    for arch, kernels in instructions.items():
        for kernel in tickets:
            cluster, number = TICKETS.match(kernel).group(1) == "512", int(arch.removeprefix("sm_"))
            works = (90 if cluster else 80) <= number < 120
            assert resources[kernel][arch].registers <= 128, f"{kernel} on {arch}"
            assert resources[kernel][arch].stack == 0, f"{kernel} on {arch}"
            for start in ("LDGSTS.E.BYPASS", "LDG.E.STRONG.GPU", "STG"):
                assert any(name.startswith(start) for name in kernels[kernel]) == works, f"{kernel} on {arch}: {start}"
            clusters = any(name.startswith("UCGABAR") for name in kernels[kernel])
            assert clusters == (works and cluster), f"{kernel} on {arch}"


def test_accesses_are_as_wide_as_planned(instructions):
    """16 bytes, or 8 where rows start at multiples of 8: loads in every kernel, stores in those that write a big tensor."""
    checked = 0
    for arch, kernels in instructions.items():
        for kernel, counter in kernels.items():
            wanted = wide_accesses(kernel)
            if not HOT.match(kernel) or not wanted or ITEMS.match(kernel):
                continue
            loads, stores = (
                sum(count for name, count in counter.items() if name.startswith(f"{instruction}.E.{wanted.bits}"))
                for instruction in ("LDG", "STG")
            )
            assert loads >= wanted.count, f"{kernel} on {arch}: {loads} loads of {wanted.bits} bits, not {wanted.count}"
            if kernel.startswith("response_gradient<"):
                assert stores >= 1, f"{kernel} on {arch}: {stores} stores of {wanted.bits} bits"
            if kernel.startswith(("fuse_", "attention_pool_backward", "sums_")):
                turns = 2 if kernel.startswith("attention_pool_backward_positions") else 1  # of the loop that stores
                assert stores * turns >= wanted.count, f"{kernel} on {arch}: {stores} stores of {wanted.bits} bits"
            checked += 1
    assert checked >= 20 * len(instructions)


def test_no_atomic_on_floating_point_numbers(instructions):
    """Their order, and with it the last bits of a sum, would change from run to run."""
    for arch, kernels in instructions.items():
        for kernel, counter in kernels.items():
            floating = [name for name in counter if re.match(r"(ATOM|RED)", name) and re.search(r"F16|F32|F64|BF16|FTZ", name)]
            assert not floating, f"{kernel} on {arch}: {floating}"


def test_no_fence_of_the_strongest_kind(instructions):
    """An acquire-release atomic of one thread is enough; MEMBAR.SC is several times as slow, and slower with every thread."""
    for arch, kernels in instructions.items():
        for kernel, counter in kernels.items():
            assert not [name for name in counter if name.startswith("MEMBAR.SC")], f"{kernel} on {arch}"


def test_nothing_fresh_comes_through_the_read_only_cache(instructions):
    """What other blocks wrote in the same launch is read past the first-level cache: STRONG.GPU."""
    for arch, kernels in instructions.items():
        for kernel, counter in kernels.items():
            if kernel.startswith("attention_pool_rows"):
                assert any("STRONG" in name for name in counter if name.startswith("LDG")), f"{kernel} on {arch}"


def test_registers_stay_within_the_budget(resources):
    budget = json.loads(machine_code.BUDGET.read_text())
    if machine_code.compiler() != budget["nvcc"]:
        pytest.skip(f"the budget was recorded with nvcc {budget['nvcc']}, this machine has {machine_code.compiler() or 'none'}")
    over = [
        f"{kernel} on {arch}: {used.registers} registers and {used.stack} bytes of stack, the budget is {allowed}"
        for kernel, of in sorted(resources.items())
        for arch, used in sorted(of.items())
        if (allowed := budget["kernels"].get(kernel, {}).get(arch)) is None
        or used.registers > allowed[0]
        or used.stack > allowed[1]
    ]
    assert not over, "\n".join(over) + "\nIf it must be: python tests/native/machine_code.py LIBRARY --record"
