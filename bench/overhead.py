"""What a call costs before any work: operators on an empty batch, and on inputs too small to matter.

python bench/overhead.py [--rounds 21]
"""

from __future__ import annotations

import argparse
from typing import Any

import frames
import measure
import torch
from candidates import make_candidates
from global_context import runs

import gcnet_ext

TINY = ((0, 64, 1, 1), (1, 64, 1, 1), (1, 64, 7, 7), (4, 256, 4, 4))  # the empty batch does nothing at all


def rows(rounds: int) -> list[dict[str, Any]]:
    """Microseconds per call; "nothing" is an operator of this package that gets an empty batch."""
    found = []
    for sizes in TINY:
        x = torch.randn(sizes)
        modules = make_candidates(sizes[1], "both", x.dtype)
        scale = torch.ones(sizes[:2])
        single = {
            "clone": x.clone,
            "channel_fuse": torch.no_grad()(lambda x=x, scale=scale: gcnet_ext.channel_fuse(x, scale, scale)),
            "attention_pool": torch.no_grad()(
                lambda x=x, weight=modules["ours"].conv_mask.weight: gcnet_ext.attention_pool(x, weight)
            ),
        }
        for direction in ("infer", "train"):
            calls = single if direction == "infer" else {}
            leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)
            for name, module in modules.items():
                if sizes[0] or name == "ours":  # eager refuses an empty batch
                    calls[name] = runs(module, leaf, grad)[direction]
            for name, timed in measure.interleaved(calls, rounds).items():
                found.append({
                    "x": "x".join(map(str, sizes)), "direction": direction, "candidate": name,
                    "microseconds": timed.median * 1e6, "iqr_microseconds": timed.iqr * 1e6,
                })  # fmt: skip
    return found


def show(found: list[dict[str, Any]]) -> None:
    title = "overhead, us per call (an empty batch: an op that does nothing)"
    shown = (
        {**{key: row[key] for key in ("x", "direction", "candidate")}, "us": row["microseconds"], "+-": row["iqr_microseconds"]}
        for row in found
    )
    print(frames.text(title, shown, decimals=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    measure.keep_memory()
    show(rows(arguments.rounds))


if __name__ == "__main__":
    main()
