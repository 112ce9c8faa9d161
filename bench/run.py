"""Every benchmark of single blocks: how much faster, how much less memory, how far from the limit. Whole models are in
whole_models.py.

    make bench                              on this machine; make bench ARGS=--quick takes two minutes
    python bench/run.py [--quick] [--only block,capabilities,memory,...] [--json FILE] [--plots FOLDER]

Writes the results with the machine, the versions, the build and the git revision as JSON, and draws them. On a machine with a
GPU bench/gpu_timing.py is run, too: CUDA events, one call at a time and as a CUDA graph, hot and cold caches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import capabilities
import global_context
import measure
import memory
import non_local
import overhead
import plots
import scaling
import torch
from engines import ENGINES
from tqdm import tqdm

SECTIONS = ("block", "capabilities", "non_local", "overhead", "scaling", "memory", "gpu")
COMPILED = ("ours compiled", "compile", "compile max-autotune", "rewrite", *ENGINES)
# ResNet-50 at 224 in batches of 1, 8 and 64, at 800x1333 (c3 to c5), the first convolution's output, and video
SHAPES = (
    *global_context.SHAPES,
    *("1x256x56x56", "1x512x28x28", "1x1024x14x14", "1x2048x7x7"),
    *("64x256x56x56", "64x1024x14x14", "64x2048x7x7"),
    *("1x2048x25x42", "8x1024x4x14x14"),
)
HALF_SHAPES = ("8x256x56x56", "8x1024x14x14", "1x1024x50x84")
QUICK_SHAPES = ("8x256x56x56",)


def block_cases(quick: bool) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Shape, layout, dtype, and what is compiled."""
    if quick:
        return [(shape, layout, "float32", ("rewrite",)) for shape in QUICK_SHAPES for layout in global_context.LAYOUTS]
    cases = []
    for layout in global_context.LAYOUTS:
        # Compiling takes most of the time: everything for the main shapes alone.
        main = global_context.SHAPES
        cases += [(shape, layout, "float32", COMPILED if shape in main else ("rewrite",)) for shape in SHAPES]
        cases += [(shape, layout, dtype, ("rewrite",)) for shape in HALF_SHAPES for dtype in ("bfloat16", "float16")]
    return cases


def block(rounds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for shape, layout, dtype, compiled in tqdm(block_cases(quick), desc="block", unit="case"):
        rows += global_context.rows_of(shape, layout, dtype, compiled=compiled, rounds=rounds)
    global_context.show(rows)
    return rows


def memory_rows(quick: bool) -> list[dict[str, Any]]:
    shapes, layouts = (memory.SHAPES[1:2], ("NCHW",)) if quick else (memory.SHAPES, global_context.LAYOUTS)
    compiled = () if quick else ("compile", "rewrite")
    found = [row for shape in shapes for layout in layouts for row in memory.rows_of(shape, layout, compiled)]
    memory.show(found)
    return found


def gpu(quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpu.json"
        script = Path(__file__).resolve().parent / "gpu_timing.py"
        command = [sys.executable, str(script), "--json", str(file), "--seconds", "60" if quick else "600"]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())


def shown(module: Any, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    module.show(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds: two minutes")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--json", type=measure.output_file, default=Path("build/bench/results.json"))
    parser.add_argument("--plots", type=Path, default=None, help="a folder; the one of the JSON file")
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--only must name sections of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    measure.keep_memory()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 256
    quick, rounds = arguments.quick, arguments.rounds or (5 if arguments.quick else 11)
    results: dict[str, Any] = {"machine": measure.machine(), "quick": quick, "rounds": rounds}
    sections = {
        "block": lambda: block(rounds, quick),
        "capabilities": lambda: shown(capabilities, capabilities.rows(rounds, quick)),
        "non_local": lambda: shown(non_local, non_local.rows(rounds, quick)),
        "overhead": lambda: shown(overhead, overhead.rows(rounds)),
        "scaling": lambda: shown(scaling, scaling.rows(rounds, quick)),
        "memory": lambda: memory_rows(quick),
    }
    if torch.cuda.is_available():
        sections["gpu"] = lambda: gpu(quick)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for name, run in sections.items():
        if name in arguments.only.split(","):
            results[name] = run()
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")  # what there is, if it is stopped
    if "gpu" not in sections:
        print("no GPU: torch.cuda.is_available() is False")
    drawn = plots.draw(results, arguments.plots or arguments.json.parent)
    print("written:", arguments.json, *drawn)


if __name__ == "__main__":
    main()
