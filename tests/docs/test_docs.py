"""docs/: the program of backward.md against autograd in float64, its table of functions, and the figures."""

from __future__ import annotations

import itertools
import re
import runpy
import sys
from typing import Any

import grid
import mutate
import pytest
import reference
import torch
from checkout import ROOT
from grid import Case, Random
from torch import Tensor

import gcnet_ext
from gcnet_ext import _load
from gcnet_ext.ops._options import ACTIVATIONS, Options

DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(
    not DOCS.is_dir() and not (ROOT / ".git").exists(), reason="this is a part of the tree, without docs"
)


@pytest.fixture(scope="module")
def backward() -> dict[str, Any]:
    """What the program of backward.md defines."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "backward.md").read_text(), re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(program, "docs/backward.md", "exec"), namespace)
    return namespace


def by_formulas(program: dict[str, Any], inputs: tuple[Tensor | None, ...], grad: Tensor, **options: Any) -> tuple:
    """The gradients of the fifteen inputs as the document has them, None where there is no input."""
    x, w, b, *weights = inputs
    scale, shift = (tuple(weights[i : i + 6]) if weights[i] is not None else None for i in (0, 6))
    positions = x.flatten(2)
    m = reference.attention_map(x, w, b).flatten(1) if w is not None else None
    ctx = reference.attention_pool(x, w, b)
    s = torch.ones_like(ctx)
    if scale is not None:
        of_branches = Options(1e-5 if options["norm"] else None, ACTIVATIONS[options["activation"]])
        t = reference.branch(ctx, gcnet_ext.Branch(*scale), of_branches)
        s = t.sigmoid() if options["gate"] == "sigmoid" else options["gate_alpha"] * t + 0.5
    dx, dw, db, dscale, dshift = program["block_backward"](
        grad.flatten(2), positions, w, scale, shift, m, ctx, s,
        norm=options["norm"], silu=options["activation"] == "silu", hard_sigmoid=options["gate"] == "hard_sigmoid",
        alpha=options["gate_alpha"],
    )  # fmt: skip
    nothing = (None,) * 6
    return dx.reshape(x.shape), dw, None if db is None else db.reshape(1), *(dscale or nothing), *(dshift or nothing)


def assert_equal(got: tuple, want: tuple, inputs: tuple[Tensor | None, ...]) -> None:
    for name, given, ours, theirs in zip(grid.GLOBAL_CONTEXT_INPUTS, inputs, got, want, strict=True):
        if given is not None:
            tolerance = 1e-12 * max(1.0, float(theirs.abs().max()))
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=tolerance), f"gradient of {name}"


BLOCKS = list(itertools.product(grid.POOLINGS, grid.FUSIONS, ("norm", "no norm", "one layer"), ("relu", "silu")))


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize(("pooling", "fusion", "layers", "activation"), BLOCKS)
def test_the_formulas_are_the_gradients(backward, pooling, fusion, layers, activation, gate):
    """Of autograd through the block in plain PyTorch, and of the compiled operator."""
    one_layer = [f"{branch}_{name}" for branch in ("scale", "shift") for name in ("norm_weight", "norm_bias", "w2", "b2")]
    case = Case(
        (3, 7, 4, 5),
        torch.float64,
        pooling=pooling,
        fusion=fusion,
        hidden=7 if layers == "one layer" else 4,
        missing=tuple(one_layer) if layers == "one layer" else (),
    )
    inputs, grad = case.inputs(), Random(1).feature_map(case.shape, torch.float64)
    options = {"norm": layers == "norm", "activation": activation, "gate": gate, "gate_alpha": 0.2}
    if layers == "no norm":
        unused = tuple(index for index, name in enumerate(grid.GLOBAL_CONTEXT_INPUTS) if "_norm_" in name)
        plain = tuple(None if index in unused else tensor for index, tensor in enumerate(inputs))
    else:
        plain = inputs
    formulas = by_formulas(backward, inputs, grad, **options)
    assert_equal(formulas, grid.run(grid.flat(reference.global_context, **options), plain, grad).grads, plain)
    if "cpu" in _load.kernel_devices:
        assert_equal(formulas, grid.run(grid.flat(gcnet_ext.global_context, **options), plain, grad).grads, plain)


def test_the_gradient_of_the_bias_is_zero(backward):
    """(B14): what is left of it is the rounding of its terms, and the operator leaves nothing."""
    case = Case((3, 7, 9, 11), torch.float64)
    inputs, grad = case.inputs(), Random(1).feature_map(case.shape, torch.float64)
    options = {"norm": True, "activation": "relu", "gate": "sigmoid", "gate_alpha": 1 / 6}
    of_bias = by_formulas(backward, inputs, grad, **options)[2]
    assert float(of_bias.abs()) < 1e-12
    assert torch.equal(grid.run(grid.flat(gcnet_ext.global_context), inputs, grad).grads[2], torch.zeros(1)) or (
        "cpu" not in _load.kernel_devices
    )


def test_one_hidden_unit_behind_a_norm_passes_nothing_on(backward):
    """n is 0, so that dh of (B8), dW1, db1, and what the branch adds to dctx are."""
    random = Random(0)
    dt, ctx = (random.normal(3, 7, dtype=torch.float64) for _ in range(2))
    more, (dW1, db1, dgamma, *_) = backward["branch_backward"](
        dt, ctx, random.branch(7, 1, torch.float64), norm=True, eps=1e-5, silu=False
    )
    for gradient in (more, dW1, db1, dgamma):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def functions() -> list[tuple[str, str]]:
    """The rows "| formulas | `function` | `file` |" of the documents."""
    row = re.compile(r"^\|[^|]*\| `(\w+)` \| `([\w./]+)` \|$", re.MULTILINE)
    return [found for path in sorted(DOCS.glob("*.md")) for found in row.findall(path.read_text())]


def test_every_function_of_the_tables_is_in_its_file():
    assert len(functions()) > 20
    missing = [
        (function, file)
        for function, file in functions()
        if not re.search(rf"\b(class )?{function}\(", (ROOT / file).read_text())
    ]
    assert not missing


def files_in_comments() -> list[tuple[str, str]]:
    """The files that comments of C++ and docstrings of Python name, each with the file that names it."""
    sources = [path for folder in ("csrc", "gcnet_ext") for path in sorted((ROOT / folder).rglob("*.*"))]
    texts = {path: path.read_text() for path in sources if path.suffix in {".cpp", ".h", ".cu", ".cuh", ".py"}}
    comment = {path: r"//[^\n]*" if path.suffix != ".py" else r"#[^\n]*|\"{3}.*?\"{3}" for path in texts}
    return [
        (str(path.relative_to(ROOT)), name)
        for path, text in texts.items()
        for found in re.findall(comment[path], text, re.DOTALL)
        for name in re.findall(r"[\w/]*\w\.(?:cpp|cuh|cu|h|py)\b", found)
    ]


def test_every_file_that_a_comment_names_is_there():
    """A signpost to a file that has moved once stood for weeks."""
    found = files_in_comments()
    assert len(found) > 30
    folders = ("csrc", "gcnet_ext", "tests", "bench", "docs", "examples")
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    missing = [(where, name) for where, name in found if not any(f"/{path}".endswith(f"/{name}") for path in paths)]
    assert not missing


def test_the_figures_are_drawn(kernels, tmp_path, monkeypatch):
    """By docs/figures.py, all that the documents show and no other, from the plan as it is; small enough to be committed."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr("sys.argv", ["figures.py", "--out", str(tmp_path)])
    monkeypatch.setattr("sys.path", list(sys.path))  # the script adds bench to it
    runpy.run_path(str(DOCS / "figures.py"), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = {name for path in DOCS.glob("*.md") for name in re.findall(r"!\[[^\]]*\]\((\w+\.png)\)", path.read_text())}
    by_the_demo = {"attention.png"}
    assert drawn | by_the_demo == shown | by_the_demo == {path.name for path in DOCS.glob("*.png")}
    for name in drawn:
        assert (tmp_path / name).stat().st_size < 100_000
        now, committed = (image.open(folder / name).info["Description"] for folder in (tmp_path, DOCS))
        assert now == committed, f"{name} is out of date: python docs/figures.py"


def test_guarantees_has_the_number_of_barriers_and_waits():
    text = (DOCS / "guarantees.md").read_text()
    count = len(mutate.mutants())
    assert f"dropping any of the {count} fails a test" in text
    assert f"a sixteenth of the {count} dropped barriers and waits" in text
