"""What README.md, CONTRIBUTING.md and docs/*.md say is so: their Python runs, their commands, paths and links are there.

The blocks of a document run in their order, in one namespace and in a folder of their own.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import eager
import imitations
import pytest
import torch
from checkout import ROOT
from networks import ResNet
from recorder import operators_in
from torch import nn

from gcnet_ext import GlobalContextBlock, SqueezeExcitation, _load

CHECKOUT = (ROOT / ".git").exists()
PAGES = (
    "adding_an_op",
    "api",
    "backward",
    "benchmarks",
    "building",
    "citing",
    "errors",
    "guarantees",
    "index",
    "memory",
    "recipes",
    "usage",
)
REQUIRED = ("README.md", "CONTRIBUTING.md", *(f"docs/{page}.md" for page in PAGES))
DOCUMENTS = [name for name in REQUIRED[:2] if (ROOT / name).exists()]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
PATCH = "docs/example_op.patch"
SUFFIXES = (".py", ".md", ".txt", ".toml", ".cpp", ".h", ".cu", ".cuh", ".png", ".patch", ".sh")

in_a_checkout = pytest.mark.skipif(not CHECKOUT, reason="this is a part of the tree, not a git checkout")


@in_a_checkout
def test_the_documents_are_there():
    assert set(REQUIRED) == set(DOCUMENTS)


@in_a_checkout
def test_the_first_page_is_short_and_leads_to_the_others():
    assert len(text_of("README.md").splitlines()) <= 150
    linked = {
        target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text_of("README.md") + text_of("CONTRIBUTING.md"))
    }
    assert set(DOCUMENTS) - {"README.md"} <= linked


# ---- the parts of a document -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block: where it is, and what is in it."""

    document: str
    heading: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(text: str, document: str = "") -> Iterator[Block]:
    heading, start, language, indent, lines = "", 0, "", 0, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"^( *)```(\w*)", line)
        if fence and not start:
            start, indent, language, lines = number, len(fence[1]), fence[2], []
        elif fence:
            yield Block(document, heading, start, language, textwrap.dedent("\n".join(lines)) + "\n")
            start = 0
        elif start:
            lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(language: str) -> list[Block]:
    return [block for name in DOCUMENTS for block in blocks_of(text_of(name), name) if block.language == language]


def code_of(document: str) -> list[str]:
    """What is set as code: between backticks, and the lines of the sh blocks."""
    text = text_of(document)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [span for _, span in re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", prose, re.DOTALL)]
    lines = [line.split("#")[0] for block in blocks_of(text) if block.language == "sh" for line in block.text.splitlines()]
    return [*spans, *lines]


# ---- Python ------------------------------------------------------------------------------------------------------------------


class Model(ResNet):
    """What a user's model may be: a ResNet, with one of our blocks behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.context = eager.randomise(GlobalContextBlock(16, 1 / 4))

    def forward(self, x):
        return self.context(self.features(super().forward(x)))


def after_replacing(names: dict[str, Any]) -> None:
    """The page shows the report of that model."""
    shown = next(block for block in blocks_of(text_of("README.md")) if "replaced, " in block.text).text.splitlines()
    printed = str(names["report"]).splitlines()
    assert shown == printed


def after_the_block(names: dict[str, Any]) -> None:
    x, out, where = names["x"], names["out"], names["where"]
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert x.grad.shape == x.shape
    assert where.shape == (16, 32, 32)
    assert torch.allclose(where.sum((1, 2)), torch.ones(16))


def after_the_arguments(names: dict[str, Any]) -> None:
    padded = names["x"].clone()
    padded[1, :, 4:] = torch.nan
    again = names["block"](padded, valid=names["lengths"][:, None] > torch.arange(9))
    assert torch.equal(again[1, :, :4], names["out"][1, :, :4])


def after_inserting(names: dict[str, Any]) -> None:
    resnet, model = names["resnet"], names["model"]
    assert names["names"] == [f"layer{stage}.{index}.context_block" for stage in (2, 3, 4) for index in (0, 1)]
    assert isinstance(model.get_submodule("features.3.context_block"), SqueezeExcitation)
    assert "context.conv_attn.weight" in names["state"]
    for changed in (resnet, model):
        assert changed(torch.ones(2, 16, 5, 6)).shape == (2, 16, 5, 6)


def after_taking_operators_out(names: dict[str, Any]) -> None:
    x = names["x"]
    want = names["model"](x)
    assert operators_in(names["program"].graph)
    for name in ("portable", "core"):
        assert not operators_in(names[name].graph)
    for function in (names["portable"].module(), names["core"].module(), names["scripted"], names["fast"]):
        assert torch.allclose(function(x), want, rtol=1e-4, atol=1e-4)


# Document and heading: what the reader brings along, and what must hold behind the blocks of that heading.
GIVEN: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
    ("docs/usage.md", "The blocks"): lambda: {
        "channels": 16,
        "x": torch.randn(2, 16, 9),
        "residual": torch.randn(2, 16, 9),
        "lengths": torch.tensor([9, 4]),
    },
    ("docs/usage.md", "Without our operators"): lambda: {
        "model": nn.Sequential(Model().features, Model().context).eval(),
        "x": torch.randn(2, 16, 5, 6),
    },
    ("docs/usage.md", "Inserting blocks"): lambda: {"resnet": Model().eval(), "model": Model().eval()},
}
AFTER = {
    ("README.md", "Replace the blocks of a model"): after_replacing,
    ("README.md", "The block"): after_the_block,
    ("docs/usage.md", "The blocks"): after_the_arguments,
    ("docs/usage.md", "Inserting blocks"): after_inserting,
    ("docs/usage.md", "Without our operators"): after_taking_operators_out,
}


def optional_modules() -> set[str]:
    """The modules of the requirements: what a block may import, although it is not everywhere."""
    names = set()
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            if found := re.match(r"[\w.-]+", line):
                names.add(found[0].removesuffix("-lite").replace("-", "_").lower())
    return names


def skip_what_cannot_run(block: Block) -> None:
    """Skips a block that imports something optional that is not installed; any other missing module is an error."""
    imported = set()
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    missing = sorted(name for name in imported if importlib.util.find_spec(name) is None)
    unknown = [name for name in missing if name not in optional_modules()]
    assert not unknown, f"{block} imports {unknown}, which no requirements file has"
    if missing:
        pytest.skip(f"{block}: {' and '.join(missing)} not installed")
    if "_load.compiled" in block.text and _load.compiled is None:
        pytest.skip(f"{block}: {_load.why_no_kernels('cpu')}")


class Run:
    """The blocks of one document that have run, and the names that they have left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.headings: set[str] = set()
        self.done = 0

    def up_to(self, block: Block, every: list[Block]) -> None:
        """Runs the block, and what stands in front of it and has not run yet."""
        for index in range(self.done, every.index(block) + 1):
            self.done = index + 1
            place = (block.document, every[index].heading)
            with pytest.MonkeyPatch.context() as patch:
                for name, module in imitations.missing().items() if place in GIVEN else ():
                    patch.setitem(sys.modules, name, module)
                if place[1] not in self.headings:
                    self.headings.add(place[1])
                    self.names.update(GIVEN.get(place, dict)())
                try:
                    skip_what_cannot_run(every[index])
                except pytest.skip.Exception:
                    if every[index] == block:
                        raise
                    continue  # its own test says so
                # The line numbers of a traceback are those of the document.
                source = "\n" * every[index].line + every[index].text
                exec(compile(source, str(ROOT / block.document), "exec"), self.names)
                if place in AFTER and place[1] not in {following.heading for following in every[index + 1 :]}:
                    AFTER[place](self.names)


RUNS: dict[str, Run] = {}


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python(block, tmp_path_factory, monkeypatch):
    run = RUNS.setdefault(block.document, Run(tmp_path_factory.mktemp("document")))
    monkeypatch.chdir(run.folder)
    torch.manual_seed(0)
    run.up_to(block, [other for other in blocks("python") if other.document == block.document])


def test_what_is_given_and_held_belongs_to_a_block():
    headings = {(block.document, block.heading) for block in blocks("python")}
    assert {*GIVEN, *AFTER} <= headings


def test_a_module_that_is_not_there(monkeypatch):
    """One of the requirements: skipped, with its name. Any other: an error, not a test that never runs."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "hypothesis" else find_spec(name))
    block = Block("README.md", "Use", 1, "python", "import torch\nfrom hypothesis import given\n")
    with pytest.raises(pytest.skip.Exception, match=r"README\.md:1: hypothesis not installed"):
        skip_what_cannot_run(block)
    with pytest.raises(AssertionError, match=r"imports \['tourch'\], which no requirements file has"):
        skip_what_cannot_run(block._replace(text="import tourch.nn as nn\n"))


# ---- commands ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make() -> Callable[[str], subprocess.CompletedProcess[str]]:
    """make -n TARGET, without what a make around this test has set."""
    if shutil.which("make") is None:
        pytest.skip("make is not on the PATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return lambda target: subprocess.run(
        ["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def targets(document: str) -> list[str]:
    found = [name for code in code_of(document) for name in re.findall(r"(?<![\w-])make\s+((?!-)[\w-]+)", code)]
    return sorted(set(found))


@in_a_checkout
@pytest.mark.parametrize(("document", "target"), [(name, target) for name in DOCUMENTS for target in targets(name)])
def test_make(make, document, target):
    """The Makefile has the target, as one that is no file."""
    done = make(target)
    assert done.returncode == 0, f"{document} names make {target}: {done.stderr}"
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target in phony[1].split(), f"{document} names make {target}, which is not .PHONY"


def test_a_target_that_does_not_exist(make):
    assert make("no-such-target").returncode != 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_subcommands_and_options(document):
    """Every option that is given to a script or a command of ours is in its source."""
    for code in code_of(document):
        for command in re.findall(r"-m gcnet_ext +(\w+)", code):
            assert f'add_parser("{command}"' in text_of("gcnet_ext/__main__.py"), f"{document}: {code}"
        commands = re.sub(r"-m gcnet_ext( +\w+)?", lambda found: f"gcnet_ext/{'_bench' if found[1] else '__main__'}.py", code)
        for script, arguments in re.findall(r"python3? ([\w/]+\.py)([^&|]*)", commands):
            if script == "setup.py":
                continue  # its options are those of setuptools
            source = (ROOT / script).read_text()
            for option in re.findall(r"(?<!\S)--[\w-]+", arguments):
                assert f'"{option}"' in source, f"{document}: {script} has no {option}"


# ---- paths and links ---------------------------------------------------------------------------------------------------------


def files() -> list[str]:
    """Every file and folder of the tree, without what is built or installed."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if name != ".git" and not is_product(name + "/")]
        found += [str(here / name) for name in (*folders, *names)]
    return found


def is_product(path: str) -> bool:
    """Whether .gitignore has it: it is made, and need not be there."""
    patterns = (ROOT / ".gitignore").read_text().split() if (ROOT / ".gitignore").exists() else []
    parts = path.rstrip("/").split("/")
    return any(
        fnmatch.fnmatch(part, pattern.rstrip("/"))
        for pattern in patterns
        for part in (parts[:-1] if pattern.endswith("/") and not path.endswith("/") else parts)
    )


def paths(document: str) -> set[str]:
    """What looks like a path of this tree: below one of its folders, or with the suffix of a source."""
    top = {path.split("/")[0] for path in files()}

    def looks_like_one(word: str) -> bool:
        if "/" in word:
            return not word.startswith("/") and (word.split("/", 1)[0] in top or word.endswith(SUFFIXES))
        return word.endswith(SUFFIXES) and word.count(".") == 1 and word[0] != "."

    words = {word.rstrip(".-/") for code in code_of(document) for word in re.findall(r"[\w.<>*/-]+", code)}
    return {word for word in words if word and looks_like_one(word)}


@in_a_checkout
@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths(document):
    """Each is a file or folder, from the root or from the document, or in the patch; <op> and * stand for any name.

    A bare name is somewhere.
    """
    tree, folder = [*files(), *patched()], str(Path(document).parent)
    missing = []
    for path in sorted(paths(document)):
        pattern = re.sub(r"<\w+>", "*", path)
        if "/" not in pattern:
            there = any(fnmatch.fnmatch(file.split("/")[-1], pattern) for file in tree)
        else:
            there = any(fnmatch.fnmatch(file, pattern) or fnmatch.fnmatch(file, f"{folder}/{pattern}") for file in tree)
        if not there and not is_product(path):
            missing.append(path)
    assert not missing, f"{document} names what is not there"


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@in_a_checkout
@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    """Those to files of this tree, and to headings of documents."""
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / document).parent / path if path else ROOT / document
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            missing.append(target)
    assert not missing, f"{document} links to what is not there"


# ---- the example of docs/adding_an_op.md -------------------------------------------------------------------------------------


def patched() -> dict[str, list[str]]:
    """File -> the lines of the patch."""
    parts = re.split(r"^diff --git .*\n", (ROOT / PATCH).read_text(), flags=re.MULTILINE)[1:]
    return {re.search(r"^\+\+\+ b/(.*)$", part, re.MULTILINE)[1]: part.splitlines() for part in parts}


@in_a_checkout
def test_the_patch_applies():
    if shutil.which("git") is None:
        pytest.skip("git is not on the PATH")
    done = subprocess.run(["git", "apply", "--check", PATCH], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}see 'When the patch no longer applies' in docs/adding_an_op.md"


def diffs() -> list[Block]:
    return [block for block in blocks("diff") if block.document == "docs/adding_an_op.md"]


@in_a_checkout
def test_there_are_diffs():
    assert len(diffs()) >= 5


@pytest.mark.parametrize("block", diffs(), ids=str)
def test_the_diffs_are_those_of_the_patch(block):
    """Line by line and in order, behind "+++ b/FILE"; what "..." leaves out may be anything."""
    remaining: list[str] = []
    assert block.text.startswith("+++ b/")
    for line in block.text.splitlines():
        if line.startswith("+++ b/"):
            remaining = patched()[line.removeprefix("+++ b/")]
        elif line.strip() != "..." and line:
            assert line in remaining, f"{block}: the patch has no (more) line {line!r}"
            remaining = remaining[remaining.index(line) + 1 :]
