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


# The same in the second engine.
ITEMS = [
    ((256, 3136, 2, False), ("row_items", 8, 256, 64, 1, 49)),
    ((256, 3136, 2, True), ("position_items", 8, 256, 64, 1, 49)),
    ((256, 3136, 4, True), ("position_items", 4, 256, 32, 1, 98)),
    ((1024, 4200, 2, True), ("position_items", 8, 256, 16, 2, 132)),
    ((2048, 49, 4, True), ("position_items", 4, 512, 8, 1, 7)),
    ((640, 196, 2, True), ("position_items", 8, 192, 16, 1, 13)),
    ((16, 3136, 2, True), ("position_items", 8, 256, 64, 16, 4)),  # a tile has 2 KB
    ((20, 3136, 2, True), ("positions", 1, 256, 64, 26, 2)),  # no accesses of 16 bytes
    ((2056, 196, 2, True), ("positions", 8, 288, 8, 2, 13)),  # too many channels for the launch that merges
    ((256, 3136, 8, True), ("streamed", 1, 256, 32, 2, 49)),
]


@pytest.mark.parametrize(("arguments", "expected"), ITEMS, ids=str)
def test_cuda_items(arguments, expected):
    names = ("path", "vector", "threads", "tile", "tiles_per_split", "splits")
    found = plan("cuda", *arguments, tuning=CudaTuning(engine="v2").numbers())
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


ENGINE_2 = CudaTuning(engine="v2").numbers()

# C, P, bytes per element, channels_last -> path, threads, positions per tile, tiles per split, splits
BACKWARD_BY_ITEMS = [
    ((64, 3136, 2, False), ("row_items", 256, 128, 1, 25)),
    ((256, 3136, 2, False), ("row_items", 256, 64, 1, 49)),
    ((256, 3136, 4, False), ("row_items", 256, 32, 1, 98)),
    ((512, 784, 2, False), ("row_items", 256, 32, 1, 25)),
    ((1024, 4200, 2, False), ("row_items", 512, 32, 2, 66)),
    ((512, 16800, 4, False), ("row_items", 256, 16, 9, 117)),
    ((1032, 784, 2, False), ("rows", 512, 32, 1, 25)),  # two stages of so many channels do not fit
    ((2048, 49, 2, False), ("flat", 256, 49, 1, 1)),
    ((256, 3136, 2, True), ("position_items", 256, 64, 1, 49)),
    ((1024, 4200, 2, True), ("position_items", 256, 16, 3, 88)),
    ((2048, 784, 4, True), ("position_items", 512, 8, 1, 98)),
    ((250, 784, 2, True), ("positions", 256, 8, 17, 6)),
    ((256, 3136, 8, True), ("streamed", 256, 32, 2, 49)),
]


@pytest.mark.parametrize(("arguments", "expected"), BACKWARD_BY_ITEMS, ids=str)
def test_the_backward_pass_by_items(arguments, expected):
    names = ("path", "threads", "tile", "tiles_per_split", "splits")
    found = plan("cuda", *arguments, tuning=ENGINE_2)
    assert tuple(found[f"backward_{name}"] for name in names) == expected


# C, P, bytes per element, channels_last -> lanes, rows, groups of channels, splits
SUMS_BY_ITEMS = [
    ((256, 3136, 2, False), (128, 2, 128, 1)),
    ((512, 784, 2, False), (32, 8, 64, 1)),
    ((1024, 4200, 2, False), (32, 8, 128, 1)),
    ((1024, 196, 4, False), (16, 16, 64, 1)),
    ((2048, 64, 2, False), (2, 128, 16, 1)),
    ((64, 40000, 2, False), (256, 1, 64, 2)),
    ((3, 40000, 2, False), (256, 1, 3, 5)),
    ((256, 3136, 2, True), (16, 16, 2, 25)),
    ((1024, 4200, 2, True), (16, 16, 8, 14)),
    ((72, 49, 2, True), (9, 28, 1, 1)),
    ((136, 4900, 2, True), (9, 28, 2, 22)),
]


@pytest.mark.parametrize(("arguments", "expected"), SUMS_BY_ITEMS, ids=str)
def test_sums_by_items(arguments, expected):
    found = plan("cuda", *arguments, tuning=ENGINE_2)
    assert tuple(found[f"sums_{name}"] for name in ("lanes", "rows", "channel_groups", "splits")) == expected


# C, P, bytes per element, channels_last -> blocks that share a tile in one ticketed launch, forward and backward
CLUSTERS = [
    ((256, 3136, 2, False), (1, 1)),
    ((512, 784, 2, False), (1, 1)),
    ((520, 784, 4, False), (2, 2)),
    ((1024, 4200, 2, False), (2, 2)),
    ((1032, 784, 2, False), (0, 0)),
    ((2048, 49, 2, False), (0, 0)),  # flat
    ((256, 3136, 2, True), (0, 0)),
    ((256, 3136, 8, False), (0, 0)),
    ((4096, 3136, 2, False), (0, 0)),
]


@pytest.mark.parametrize(("arguments", "expected"), CLUSTERS, ids=str)
def test_clusters_of_a_ticketed_launch(arguments, expected):
    def clusters(**decisions):
        found = plan("cuda", *arguments, tuning=CudaTuning(**decisions).numbers())
        return found["cluster"], found["backward_cluster"]

    assert clusters(engine="tickets") == clusters(engine="tickets", cluster=2) == expected
    assert clusters(engine="tickets", cluster=1) == tuple(blocks if blocks == 1 else 0 for blocks in expected)
    assert clusters(engine="v2") == clusters() == (0, 0)


MB = 10**6
# Bytes of a sample, samples, bytes of an item -> items by which the last stage is late
LAGS = [
    ((1_605_632, 8, 32_768), 8 * 49),  # all
    ((1_605_632, 64, 32_768), 611),  # 20 MB
    ((8_601_600, 8, 65_536), 306),
    ((17_203_200, 8, 65_536), 123),  # 8 MB
    ((51_380_224, 8, 65_536), 123),
    ((25 * MB, 1, MB), 25),
    ((25 * MB + 1, 1, MB), 8),
    ((16 * MB, 2, MB), 20),
    ((26 * MB, 1, 6 * MB), 2),
    ((16 * MB, 100, 3 * MB), 7),
    ((4096, 0, 4096), 0),
]


@pytest.mark.parametrize(("arguments", "expected"), LAGS, ids=str)
def test_the_lag_of_a_ticketed_launch(arguments, expected):
    lag = _load.compiled.plan_cuda_lag
    assert lag(*arguments) == expected
    assert lag(*arguments, CudaTuning(engine="tickets", lag=9).numbers()) == 9
    assert lag(*arguments, CudaTuning(engine="tickets", lag=-1).numbers()) == 0


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
        ((2048, 49, 2, True), "position_items"),
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


@given(st.integers(1, 20_000), SIZES, st.sampled_from((2, 4, 8)), st.booleans(), st.booleans(), st.sampled_from(("v1", "v2")))
def test_every_cuda_plan_covers_every_position_once(channels, positions, size, channels_last, aligned, engine):
    got = plan("cuda", channels, positions, size, channels_last, aligned, tuning=CudaTuning(engine=engine).numbers())
    split = got["tile"] * got["tiles_per_split"]
    assert (got["splits"] - 1) * split < positions <= got["splits"] * split
    by_items = got["path"] in ("row_items", "position_items")
    assert engine == "v2" or not by_items
    assert 1 <= got["splits"] <= (256 if by_items else 64)
    any_warps = got["path"] in ("positions", "position_items")
    assert got["threads"] in (256, 512) or (any_warps and got["threads"] % 32 == 0 and got["threads"] <= 512)
    row = (channels if channels_last else positions) * size
    assert got["vector"] == 1 or (aligned and row % (got["vector"] * size) == 0)
    assert got["vector"] * size <= 16
    assert not by_items or got["vector"] * size == 16


@given(st.integers(1, 20_000), SIZES, st.sampled_from((2, 4, 8)), st.booleans(), st.booleans())
def test_every_plan_by_items_covers_everything_once(channels, positions, size, channels_last, aligned):
    got = plan("cuda", channels, positions, size, channels_last, aligned, ENGINE_2)
    split = got["backward_tile"] * got["backward_tiles_per_split"]
    assert (got["backward_splits"] - 1) * split < positions <= got["backward_splits"] * split
    assert got["backward_splits"] <= 128
    assert (got["sums_splits"] - 1) * got["sums_split"] < positions <= got["sums_splits"] * got["sums_split"]
    assert got["sums_splits"] <= 64
    lanes, rows, groups = got["sums_lanes"], got["sums_rows"], got["sums_channel_groups"]
    assert lanes * rows <= 256
    vector = 16 // size if aligned and channels * size % 16 == 0 else 1
    width = lanes * vector if channels_last else rows
    assert (groups - 1) * width < channels <= groups * width


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
