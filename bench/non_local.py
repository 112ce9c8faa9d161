"""The non-local block: ours, which never forms the P x P weights, beside mmcv's NonLocal2d, which does.

    python bench/non_local.py [--rounds 7]

Results are compared before they are timed. Without mmcv (mmcv-lite) there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import frames
import measure
import torch
from global_context import feature_map, runs
from torch import nn

import gcnet_ext

SHAPES = ("2x1024x14x14", "2x512x28x28", "1x256x56x56")
MODES = ("embedded_gaussian", "gaussian", "dot_product")  # mmcv's concatenation has no backward pass


def rows(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """Microseconds per shape, mode and direction; and peak memory of a training step."""
    try:
        mmcv = importlib.import_module("mmcv.cnn")
    except ImportError as error:
        print(f"mmcv's NonLocal2d is left out: {error}")
        mmcv = None
    found = []
    for shape in SHAPES[:1] if quick else SHAPES:
        x = feature_map(shape, "NCHW", torch.float32)
        leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)
        for mode in MODES:
            ours = gcnet_ext.NonLocalBlock(x.shape[1], mode=mode)
            for parameter in ours.parameters():
                nn.init.normal_(parameter, std=0.05)
            modules: dict[str, nn.Module] = {"ours": ours}
            if mmcv is not None:
                modules["mmcv"] = mmcv.NonLocal2d(x.shape[1], mode=mode)
                modules["mmcv"].load_state_dict(ours.state_dict())
                with torch.no_grad():
                    error = float((ours(x) - modules["mmcv"](x)).norm() / ours(x).norm())
                if not error < 1e-4:
                    raise SystemExit(f"the non-local blocks differ for {shape} {mode}: relative error {error:.2e}")
            peak = {name: measure.peak_memory(runs(module, leaf, grad)["train"])[0] for name, module in modules.items()}
            for direction in ("infer", "train"):
                calls = {name: runs(module, leaf, grad)[direction] for name, module in modules.items()}
                for name, timed in measure.interleaved(calls, rounds).items():
                    found.append({
                        "x": shape, "mode": mode, "direction": direction, "candidate": name,
                        "microseconds": timed.median * 1e6, "iqr_microseconds": timed.iqr * 1e6,
                        "train_peak": peak[name], "bytes_of_x": x.nbytes,
                    })  # fmt: skip
    return found


def show(found: list[dict[str, Any]]) -> None:
    shown = (
        {key: row[key] for key in ("x", "mode", "direction", "candidate")}
        | {"us": row["microseconds"], "+-": row["iqr_microseconds"]}
        | {"peak of a training step, in x": row["train_peak"] / row["bytes_of_x"]}
        for row in found
    )
    print(frames.text("non-local block", shown, decimals=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    measure.keep_memory()
    torch.manual_seed(0)
    show(rows(arguments.rounds))


if __name__ == "__main__":
    main()
