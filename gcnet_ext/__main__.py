"""``python -m gcnet_ext``: what was built, what this machine can use, and why not more; ``bench`` measures what it gains.

``--library`` prints the path of the operator library alone, for C++ programs, and in a second line that of the CUDA kernels
where they are loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import _bench, _build, _info, _libraries, _load
from ._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name) and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gcnet_ext",
        description="Says what was built, what this machine can use, and why anything is not used.",
    )
    parser.add_argument("--version", action="version", version=f"gcnet_ext {__version__}")
    parser.add_argument("--json", action="store_true", help="the same for a program: paste it into an issue")
    parser.add_argument("--library", action="store_true", help="the path of libgcnet_ext.so alone, which C++ programs load")
    commands = parser.add_subparsers(dest="command", metavar="bench")
    bench = commands.add_parser("bench", help="what this package gains on this machine; takes a minute")
    _bench.add_arguments(bench)
    arguments = parser.parse_args(argv)
    if arguments.command == "bench":
        try:
            print(_bench.run(arguments))
        except ValueError as error:
            bench.error(str(error))
        return 0
    if arguments.library:
        if _load.library is None:
            print(f"gcnet_ext has no library here: {_load.why_no_kernels('cpu')}", file=sys.stderr)
            return 1
        print(_load.library)
        if "cuda" in _load.kernel_devices:
            print(_libraries.find(_build.CUDA_LIBRARY))
        return 0
    print(json.dumps(_info.facts(), indent=1) if arguments.json else _info.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
