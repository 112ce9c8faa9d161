"""The block with each of the vector instructions that this processor has, beside the best of them.

    python bench/capabilities.py [--rounds 11] [--quick] [--json FILE]

The kernels choose them once in a process, so each has a process of its own, and what is compared are multiples of the
x.clone() of the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import frames
import global_context
import measure
import torch

from gcnet_ext import _load


def own_rows(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """One row per shape, layout, and direction, with the instructions of this process."""
    torch.manual_seed(0)
    capability = {"capability": _load.compiled.cpu_capability()}
    cases = [(shape, layout) for shape in global_context.SHAPES[: 1 if quick else None] for layout in global_context.LAYOUTS]
    found = [row for case in cases for row in global_context.rows_of(*case, "float32", rounds=rounds, peers=False)]
    return [capability | row for row in found if row["candidate"] == "ours"]


def rows(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """Those of all instructions, the best first."""
    found = []
    for capability in _load.compiled.usable_capabilities():
        if capability == "avx512_bf16":
            continue  # its loops are those of avx512, but for bfloat16
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, __file__, "--own", f"--rounds={rounds}", "--json", str(file)]
            environment = {**os.environ, "GCNET_EXT_CPU_CAPABILITY": capability}
            subprocess.run([*command, *(["--quick"] if quick else [])], env=environment, check=True)
            found += json.loads(file.read_text())
    return found


def table(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a line per case, a column per direction and capability, and the geometric means below."""
    figures = {(row["x"], row["layout"], row["direction"], row["capability"]): row for row in found}
    capabilities = dict.fromkeys(row["capability"] for row in found)
    columns = [(direction, capability) for direction in ("infer", "train") for capability in capabilities]
    cells = []
    for case in dict.fromkeys(key[:2] for key in figures):
        of_case = (figures[(*case, *column)] for column in columns)
        cells.append([" ".join(case), *map(global_context.cell, of_case)])
    means = {
        capability: global_context.summary([row for row in found if row["capability"] == capability])
        for capability in capabilities
    }
    cells.append(["**geometric mean**", *(f"**{means[name][f'{way} ours']['clones']:.2f}**" for way, name in columns)])
    return ["x", *(f"{direction}: {capability}" for direction, capability in columns)], cells


def show(found: list[dict[str, Any]]) -> None:
    print(frames.of_cells("the block by vector instructions, in multiples of x.clone()", *table(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--own", action="store_true", help="only the instructions that this process has chosen")
    parser.add_argument("--json", type=measure.output_file, help="where the figures go, too")
    arguments = parser.parse_args()
    measure.keep_memory()
    found = (own_rows if arguments.own else rows)(arguments.rounds, arguments.quick)
    if not arguments.own:
        show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
