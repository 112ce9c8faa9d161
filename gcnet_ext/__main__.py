"""``python -m gcnet_ext``: what was built, what this machine can use, and why not more. Subcommands show the block at work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import _info, compare, demo

# A subcommand is a module with HELP, add_arguments(parser) and run(arguments) -> exit code.
COMMANDS = {"demo": demo, "compare": compare}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name) and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gcnet_ext",
        description="Without a command: what was built, what this machine can use, and why anything is not used.",
    )
    parser.set_defaults(run=_print_description)
    subparsers = parser.add_subparsers(title="commands", metavar="command")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=module.HELP, description=module.HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _print_description(_arguments: argparse.Namespace) -> int:
    print(_info.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
