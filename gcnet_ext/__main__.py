"""``python -m gcnet_ext``: what was built, what this machine can use, and why not more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import _info


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name) and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gcnet_ext",
        description="Says what was built, what this machine can use, and why anything is not used.",
    )
    parser.parse_args(argv)
    print(_info.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
