"""Every op by its name, and every operator: the entries of tests/ops. A new op adds a file there, and is in no other list."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from checkout import ROOT
from entry import Op, Operator


def entry(path: Path) -> Op:
    """The file is loaded by its path: its name is that of an op, and may be that of a module elsewhere."""
    spec = importlib.util.spec_from_file_location(f"entry_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.OP.name == path.stem, f"{path} has the entry of {module.OP.name}"
    return module.OP


OPS: dict[str, Op] = {
    path.stem: entry(path) for path in sorted((ROOT / "tests" / "ops").glob("*.py")) if not path.stem.startswith("test_")
}
OPERATORS: dict[str, Operator] = {operator.name: operator for op in OPS.values() for operator in op.operators}
OP_OF: dict[str, Op] = {operator.name: op for op in OPS.values() for operator in op.operators}
IN_PLACE: dict[str, Op] = {
    operator.name: op for op in OPS.values() for operator in op.operators if operator.name == f"{op.name}_"
}
"""What the function of an op calls with ``inplace=True``."""
