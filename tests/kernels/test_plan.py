"""How the kernels cut their work, as gcnet_ext._C.plan tells it: a table of shapes, and what must hold for every shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcnet_ext import _load
from gcnet_ext._tuning import CudaTuning

pytestmark = pytest.mark.usefixtures("kernels")


def plan(device: str, *arguments, **options) -> dict:
    return _load.compiled.plan(device, *arguments, **options)


# C, P, bytes per element, channels_last -> path, elements per access, threads, positions per tile, tiles per split, splits
CUDA = [
    ((64, 1024, 4, False), ("rows", 4, 256, 64, 1, 16)),
    ((256, 3136, 4, False), ("rows", 4, 256, 64, 1, 49)),
    ((256, 3136, 2, False), ("rows", 8, 256, 128, 1, 25)),
    ((512, 784, 4, False), ("rows", 4, 256, 32, 1, 25)),
    ((1024, 196, 4, False), ("rows", 4, 512, 32, 1, 7)),
    ((1024, 196, 2, False), ("rows", 4, 512, 64, 1, 4)),  # rows of 392 bytes: accesses of 8
    ((1024, 98, 2, False), ("rows", 1, 512, 32, 1, 4)),  # rows of 196 bytes: accesses of one element
    ((2048, 64, 4, False), ("rows", 4, 512, 16, 1, 4)),
    ((2048, 49, 4, False), ("rows", 1, 512, 16, 1, 4)),
    ((2048, 196, 2, False), ("rows", 4, 512, 32, 1, 7)),
    ((2048, 49, 4, True), ("positions", 4, 512, 8, 1, 7)),
    ((1024, 4200, 4, False), ("rows", 4, 512, 32, 3, 44)),
    ((512, 16800, 4, True), ("positions", 4, 256, 16, 17, 62)),
    ((512, 16800, 2, True), ("positions", 8, 256, 32, 9, 59)),
    ((256, 3136, 8, False), ("streamed", 1, 256, 32, 2, 49)),  # float64 has one path
    ((4096, 196, 4, False), ("streamed", 1, 256, 32, 1, 7)),
    ((16384, 49, 4, True), ("streamed", 1, 256, 32, 1, 2)),
    ((64, 1, 4, False), ("rows", 1, 256, 32, 1, 1)),
    ((64, 10**7, 4, False), ("rows", 4, 256, 64, 2442, 64)),
]


@pytest.mark.parametrize(("arguments", "expected"), CUDA, ids=str)
def test_cuda(arguments, expected):
    names = ("path", "vector", "threads", "tile", "tiles_per_split", "splits")
    found = plan("cuda", *arguments)
    assert tuple(found[name] for name in names) == expected


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, (64, 1)), (64, (64, 1)), (65, (64, 2)), (256, (64, 4)), (512, (64, 8)), (2048, (256, 8))]
)
def test_slices_of_the_transform(channels, expected):
    found = plan("cuda", channels, 49)
    assert (found["slice_channels"], found["slices"]) == expected


@given(st.integers(1, 20_000))
def test_every_channel_is_in_one_slice(channels):
    found = plan("cuda", channels, 49)
    assert found["slices"] <= 8
    assert found["slice_channels"] % 64 == 0
    assert (found["slices"] - 1) * found["slice_channels"] < channels <= found["slices"] * found["slice_channels"]


# C, P, bytes per element -> rows and pieces, rows of a unit, elements that a lane reads together, lanes of a row
FLAT = [
    ((2048, 49, 2), (160, 13, 8, 1, 2)),
    ((2048, 49, 4), (128, 16, 4, 1, 2)),
    ((1024, 196, 2), (64, 16, 2, 4, 16)),
    ((1024, 196, 4), (41, 25, 1, 4, 16)),
    ((512, 50, 2), (128, 4, 4, 2, 2)),
    ((3, 7, 2), (8, 1, 8, 1, 16)),
    ((2048, 3, 4), (1024, 2, 4, 1, 2)),
]
ENGINE_2 = CudaTuning(engine=2).numbers()


@pytest.mark.parametrize(("arguments", "expected"), FLAT, ids=str)
def test_flat(arguments, expected):
    found = plan("cuda", *arguments, tuning=ENGINE_2)
    assert found["path"] == "flat"
    assert tuple(found[f"flat_{name}"] for name in ("rows", "pieces", "unit_rows", "row_vector", "lanes")) == expected


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ((256, 256, 2), "row_items"),
        ((256, 255, 2), "flat"),
        ((512, 784, 2), "row_items"),
        ((64, 1050, 2), "flat"),
        ((2048, 1050, 2), "rows"),  # too many pieces
        ((64, 1087, 2), "rows"),  # a unit is too large
        ((2049, 49, 2), "streamed"),
        ((2048, 49, 8), "streamed"),
        ((2048, 49, 2, True), "positions"),
        ((2048, 6, 2), "rows"),  # an access has elements of three rows
        ((2048, 2, 4), "rows"),
    ],
    ids=str,
)
def test_which_maps_are_flat(arguments, path):
    assert plan("cuda", *arguments, tuning=ENGINE_2)["path"] == path
    assert plan("cuda", *arguments)["path"] != "flat"


@given(st.integers(1, 2048), st.integers(1, 1088), st.sampled_from((2, 4)), st.booleans())
def test_every_flat_plan_covers_every_row_once_in_whole_accesses(channels, positions, size, aligned):
    got = plan("cuda", channels, positions, size, False, aligned, tuning=ENGINE_2)
    rows, pieces, unit, vector, lanes = (got[f"flat_{name}"] for name in ("rows", "pieces", "unit_rows", "row_vector", "lanes"))
    assert (pieces - 1) * rows < channels <= pieces * rows
    assert rows % unit == 0
    assert unit * positions * size % 16 == 0
    assert unit == 1 or (unit // 2) * positions * size % 16 != 0
    assert positions % vector == 0
    assert lanes in (2, 16)
    if got["path"] == "flat":
        assert pieces <= 32
        assert rows * positions * size <= 34 << 10
        assert unit * positions <= 4224


SIZES = st.one_of(st.integers(1, 5000), st.integers(1, 2**40))


@given(st.integers(1, 20_000), SIZES, st.sampled_from((2, 4, 8)), st.booleans(), st.booleans())
def test_every_cuda_plan_covers_every_position_once(channels, positions, size, channels_last, aligned):
    got = plan("cuda", channels, positions, size, channels_last, aligned)
    split = got["tile"] * got["tiles_per_split"]
    assert (got["splits"] - 1) * split < positions <= got["splits"] * split
    assert 1 <= got["splits"] <= 64
    assert got["threads"] in (256, 512) or (got["path"] == "positions" and got["threads"] % 32 == 0 and got["threads"] <= 512)
    row = (channels if channels_last else positions) * size
    assert got["vector"] == 1 or (aligned and row % (got["vector"] * size) == 0)
    assert got["vector"] * size <= 16


@given(st.integers(1, 20_000), SIZES, st.sampled_from((2, 4, 8)), st.booleans())
def test_every_cpu_plan_covers_everything_once(channels, positions, size, channels_last):
    got = plan("cpu", channels, positions, size, channels_last)
    assert (got["splits"] - 1) * got["split"] < positions <= got["splits"] * got["split"]
    assert got["split"] % got["tile"] == 0
    for extent, name in ((channels, "channel"), (positions, "position")):
        blocks, block = got[f"sweep_{name}_blocks"], got[f"sweep_{name}s"]
        assert (blocks - 1) * block < extent <= blocks * block


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_that_do_not_exist(device):
    for position in range(3):
        arguments = [8, 8, 4]
        for arguments[position] in (0, -1):
            with pytest.raises(ValueError, match="channels, positions and element_size must be at least 1"):
                plan(device, *arguments)


def test_device_that_does_not_exist():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        plan("tpu", 8, 8)
