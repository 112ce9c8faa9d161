"""Shows what became slower or faster between two results of bench/run.py.

    python bench/compare.py OLD.json NEW.json [--tolerance 0.1]

What is compared are multiples of x.clone(), so that a faster machine is no improvement. A change counts when it is larger than
the tolerance and than the interquartile ranges of both figures. Ends with 1 if anything of ours became slower.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

KEY = ("x", "layout", "dtype", "fusion", "direction", "candidate")


class Change(NamedTuple):
    """One figure, in clones, before and after; its spread relative to itself."""

    name: str
    candidate: str
    old: float
    new: float
    spread: float

    @property
    def ratio(self) -> float:
        return self.new / self.old


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every figure that is in both."""
    before = {tuple(row[key] for key in KEY): row for row in old["block"] if row["candidate"] != "clone"}
    found = []
    for row in new["block"]:
        was = before.get(tuple(row[key] for key in KEY))
        if was is not None:
            spread = sum(r["iqr_microseconds"] / r["microseconds"] for r in (was, row))
            name = " ".join(row[key] for key in KEY)
            found.append(Change(name, row["candidate"], was["clones"], row["clones"], spread))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="a change up to this fraction is noise")
    arguments = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (arguments.old, arguments.new))
    for name, results in (("old", old), ("new", new)):
        machine = results["machine"]
        print(f"{name}: {machine['date']} {machine['processor']}, torch {machine['torch']}, {machine['revision'][:12]}")
    found = changes(old, new)
    if not found:
        print("the two have no figure in common")
        return 2
    slower = 0
    for change in sorted(found, key=lambda change: change.ratio):
        if abs(change.ratio - 1) > max(arguments.tolerance, change.spread):
            word = "slower" if change.ratio > 1 else "faster"
            slower += change.ratio > 1 and change.candidate == "ours"
            figures = f"{change.old:6.2f} -> {change.new:6.2f} clones +- {change.spread:.0%}"
            print(f"{word} {change.ratio:5.2f}x  {figures}  {change.name}")
    print(f"{len(found)} figures compared, {slower} of ours slower")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
