"""Nothing that is read is executed: no unpickling, no eval, no shell; and what the JIT loader executes is the user's own."""

from __future__ import annotations

import ast
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkout import ROOT
from torch import nn
from torch.utils import cpp_extension

from gcnet_ext import _build

# ---- what no source may call -------------------------------------------------------------------------------------------------

FORBIDDEN = re.compile(
    r"(builtins\.)?(eval|exec)|os\.(system|popen)|pty\.\w+|subprocess\.(getoutput|getstatusoutput)"
    r"|(_?pickle|cPickle|dill|cloudpickle|marshal)\.(load|loads|Unpickler)|shelve\.open|joblib\.load|pandas\.read_pickle"
    r"|torch\.(hub\.load|package\.PackageImporter)|yaml\.(load|unsafe_load)|asyncio\.create_subprocess_shell"
)
FOLDERS = ("gcnet_ext", "examples", "bench")
SOURCES = [ROOT / "setup.py", *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]


def full_name(node: ast.expr, imported: dict[str, str]) -> str:
    """The name of a function as its module has it: `import os as o; o.system` is os.system."""
    match node:
        case ast.Name(id=name):
            return imported.get(name, name)
        case ast.Attribute(value=value, attr=name):
            return f"{full_name(value, imported)}.{name}"
        case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]):
            return module if full_name(function, imported) in ("__import__", "importlib.import_module") else ""
    return ""


def findings(source: str) -> list[str]:
    """Line and name of everything that would execute or unpickle what it is given."""
    tree = ast.parse(source)
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {a.asname or a.name: f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = full_name(node, imported)
            if FORBIDDEN.fullmatch(name):
                found.append(f"{node.lineno}: {name}")
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, imported)
        given = {keyword.arg: getattr(keyword.value, "value", keyword.value) for keyword in node.keywords}
        if name in ("torch.load", "torch.serialization.load") and given.get("weights_only") is not True:
            found.append(f"{node.lineno}: {name} without weights_only=True")
        if given.get("shell", False) is not False or given.get("allow_pickle", False) is not False:
            found.append(f"{node.lineno}: {name} with shell or allow_pickle")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path):
    assert findings(path.read_text()) == []


def test_all_sources_are_looked_at():
    assert {ROOT / "gcnet_ext" / "_jit.py", ROOT / "examples" / "train.py", ROOT / "setup.py"} <= set(SOURCES)


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "from torch import load as read; read(path, weights_only=wanted)",
        "import pickle; pickle.load(file)",
        "from pickle import loads; loads(data)",
        "import pickle as p; read = p.load",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "eval(text)",
        "run = exec",
        "__import__('os').system(text)",
        "import os; os.popen(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "from subprocess import check_output as run; run(text, shell=wanted)",
        "import importlib; importlib.import_module('pickle').loads(data)",
    ],
)
def test_what_would_be_found(source):
    assert len(findings(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path, map_location='cpu', weights_only=True)",
        "model.eval(); re.compile(text); json.load(file); system = 1",
        "import subprocess; subprocess.run(['ls', path], shell=False)",
        "import numpy as np; np.load(path)",
    ],
)
def test_what_would_not_be_found(source):
    assert findings(source) == []


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_example_does_not_execute_its_checkpoint(tmp_path):
    pytest.importorskip("tqdm")
    spec = importlib.util.spec_from_file_location("train_example", ROOT / "examples" / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    checkpoint, executed = tmp_path / "checkpoint.pt", tmp_path / "executed"
    torch.save({"model": Touch(executed)}, checkpoint)
    model = nn.Linear(1, 1)
    state = train.State(model, torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        state.load(checkpoint)
    assert not executed.exists()
    torch.load(checkpoint, weights_only=False)
    assert executed.exists(), "this checkpoint would have shown nothing"


# ---- what the JIT loader executes --------------------------------------------------------------------------------------------


@pytest.fixture
def jit() -> ModuleType:
    from gcnet_ext import _jit

    return _jit


def test_a_new_folder_is_private(jit, tmp_path):
    before = os.umask(0)
    try:
        assert jit.private(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    jit.private(tmp_path / "a" / "b")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755, 0o702])
def test_a_folder_open_to_others_is_refused(jit, tmp_path, mode):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(RuntimeError, match=r"open is open to other users; chmod 700 it, or .* GCNET_EXT_JIT_DIR"):
        jit.private(tmp_path / "open")


def test_a_folder_of_another_user_is_refused(jit, tmp_path, monkeypatch):
    me = os.geteuid()
    (tmp_path / "link").symlink_to(tmp_path / "own")
    (tmp_path / "own").mkdir(mode=0o700)
    jit.private(tmp_path / "link")
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    for name in ("own", "link", "new"):
        with pytest.raises(RuntimeError, match=f"{name} belongs to another user; .* GCNET_EXT_JIT_DIR"):
            jit.private(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder or a link away")
def test_a_link_of_another_user_is_refused(jit, tmp_path):
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)
    with pytest.raises(RuntimeError, match="link belongs to another user"):
        jit.private(tmp_path / "link")


LIBRARY = """
extern "C" __attribute__((visibility("default"))) const char* gcnet_ext_version() { return GCNET_EXT_VERSION; }
"""
MODULE = """
#include <pybind11/pybind11.h>
extern "C" const char* gcnet_ext_version();
PYBIND11_MODULE(_C, m) { m.attr("version") = gcnet_ext_version(); }
"""
BY_JIT = "from gcnet_ext import _jit; print(_jit.load().version)"
BY_SETUP = "import runpy, sys; sys.argv[:] = ['setup.py', 'build_ext', '-i']; runpy.run_path('setup.py', run_name='__main__')"
NAMES = {
    "blank": "a b;touch executed;c",
    "quotes": "it's `touch executed` & \"touch executed;'c",
    "dollar": "a$(touch executed)",
}


def checkout(parent: Path, name: str) -> Path:
    """A checkout of that name, with two small files to compile."""
    root = parent / name
    root.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "gcnet_ext", root / "gcnet_ext", ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root)
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "csrc" / "python").mkdir()
    (root / "csrc" / "exports.cpp").write_text(LIBRARY)
    (root / "csrc" / "python" / "bindings.cpp").write_text(MODULE)
    return root


def build(root: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GCNET_EXT_", "PYTHONPATH"))}
    environment |= {"GCNET_EXT_CUDA": "0", "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", [BY_JIT, BY_SETUP], ids=["jit", "setup.py"])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_does_not_become_a_command(tmp_path, name, script):
    """The checkout is built, or its path is refused in a sentence."""
    done = build(checkout(tmp_path, NAMES[name]), script)
    assert list(tmp_path.rglob("executed")) == []
    if name == "dollar":
        assert re.search(r"ninja does not take '\$' in the path .*; use a path without it", done.stderr), done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.rglob("_C*.so"))
    assert list(tmp_path.rglob("libgcnet_ext.so"))


@pytest.mark.parametrize("name", ["a\n  command = touch executed", "a$in", "a:b", "a|b"])
def test_a_path_that_ninja_would_misread_is_refused(name):
    with pytest.raises(_build.BuildStop, match=f"ninja does not take {re.escape(repr(name[1]))} in the path"):
        _build.require_plain_path(f"/home/{name}/csrc")


def test_a_torch_whose_path_is_a_command_is_refused(jit, monkeypatch):
    """torch writes the path of its libraries into the command line as it is."""
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", "/home/a b;touch executed/torch/lib")
    monkeypatch.setattr(cpp_extension, "load", lambda **_: pytest.fail("it was compiled"))
    with pytest.raises(_build.BuildStop, match=r"touch executed/torch/lib' has spaces or characters special to a shell"):
        jit.load()
