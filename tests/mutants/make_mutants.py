"""Makes a developer's mistakes in a copy of the tree, one at a time; the Python tests must notice.

    python tests/mutants/make_mutants.py [NAME or NUMBER ...] [--jobs N] [--list]

All mistakes in C++ are compiled into one library, where GCNET_EXT_MUTANT chooses one; those in Python are put into a copy
of the file for as long as the tests run. Prints which test file noticed which mistake, a table of the test files, and
killed/total; fails where less than 95 % are noticed. Takes about a quarter of an hour; the copy stays in build/mutants.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import of_blocks
import of_cpp
import of_derivatives
import of_kernels
import of_models
import of_ops
import of_tools
from mutant import ROOT, Mutant, applied, path_of

MUTANTS = (
    *of_cpp.MUTANTS,
    *of_kernels.MUTANTS,
    *of_ops.MUTANTS,
    *of_blocks.MUTANTS,
    *of_models.MUTANTS,
    *of_derivatives.MUTANTS,
    *of_tools.MUTANTS,
)
NUMBERS = {mutant: number for number, mutant in enumerate(MUTANTS, 1)}
BUILD = ROOT / "build" / "mutants"
HEADER_FILE = BUILD / "mutant.h"
FLAGS_FILE = "gcnet_ext/_build.py"
ENOUGH = 0.95
TIME_LIMIT = 300  # seconds for one test file; a mutant that hangs is a mutant that was noticed
NO_TESTS = (4, 5)  # what pytest ends with when it was called wrongly, or has found no test

HEADER = """#pragma once
#include <cstdlib>

namespace gcnet_ext {
inline const int chosen_mutant = [] {
  const char* number = std::getenv("GCNET_EXT_MUTANT");
  return number ? std::atoi(number) : 0;
}();
inline bool mutant(int number) { return number == chosen_mutant; }
}  // namespace gcnet_ext
"""


# ---- the copy ----------------------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Only what has changed, so that only that is compiled again."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def with_choices(file: str, source: str) -> str:
    """A C++ source with all of its mistakes, to be chosen from at run time."""
    for mutant, number in NUMBERS.items():
        if mutant.file == file:
            source = applied(source, mutant, mutant.choice(number))
    return source


def copy_tree() -> Path:
    """Everything that git knows or would take, with the choices in C++."""
    tree = BUILD / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = {file for file in listed.stdout.split("\0") if file and (ROOT / file).is_file()}
    for file in files:
        content = (ROOT / file).read_bytes()
        if file.startswith("csrc/"):
            content = with_choices(file, content.decode()).encode()
        elif file == FLAGS_FILE:  # not by CFLAGS, in whose place the flags of a usual build would not be
            content = content.replace(b"CXX_FLAGS = (", f'CXX_FLAGS = (\n    "-include",\n    "{HEADER_FILE}",'.encode())
        write(tree / file, content)
    for path in [path for folder in ("csrc", "gcnet_ext", "tests") for path in (tree / folder).rglob("*")]:
        if path.is_file() and path.suffix != ".so" and str(path.relative_to(tree)) not in files:
            path.unlink()
    return tree


def compile_choices(tree: Path) -> None:
    write(HEADER_FILE, HEADER.encode())
    environment = {**os.environ, "GCNET_EXT_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"the mutants do not compile:\n{done.stdout[-8000:]}{done.stderr[-8000:]}")


def copy_for_worker(tree: Path, number: int) -> Path:
    """A copy of its own, for mistakes in Python; the compiled library is the same."""
    worker = BUILD / f"worker-{number}"
    shutil.rmtree(worker, ignore_errors=True)
    shutil.copytree(tree, worker, ignore=shutil.ignore_patterns("build", "*.so", "__pycache__"))
    for library in (tree / "gcnet_ext").glob("*.so"):
        os.link(library, worker / "gcnet_ext" / library.name)
    return worker


# ---- the tests ---------------------------------------------------------------------------------------------------------------


def passes(tree: Path, test: str, number: int = 0) -> bool:
    """Whether that test file passes: on the CPU, and without what takes minutes."""
    # One thread: several mutants share the cores. Tests that need more threads ask for them.
    own = {
        "GCNET_EXT_MUTANT": str(number),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    environment = {**os.environ, **own}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not emulated", "-m", "not slow"]
    process = subprocess.Popen(
        [*command, path_of(test)],
        cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode in NO_TESTS:
        raise RuntimeError(f"pytest ran no test of {test}:\n{output}")
    return process.returncode == 0


def noticed_by(mutant: Mutant, tree: Path) -> str | None:
    """The first of its test files that fails."""
    if mutant.compiled:
        return next((test for test in mutant.tests if not passes(tree, test, NUMBERS[mutant])), None)
    path = tree / mutant.file
    source = path.read_text()
    path.write_text(applied(source, mutant, mutant.replaced_by(mutant.mistake)))
    try:
        return next((test for test in mutant.tests if not passes(tree, test)), None)
    finally:
        path.write_text(source)


def report(results: dict[Mutant, str | None]) -> int:
    killed = Counter(test.partition("::")[0] for test in results.values() if test is not None)
    print("\nnoticed by")
    for test, count in killed.most_common():
        print(f"  {count:3}  {test}")
    survivors = [mutant for mutant, test in results.items() if test is None]
    for mutant in survivors:
        print(f"survived: {mutant.name} ({mutant.file}): {mutant.what}")
    print(f"killed {killed.total()}/{len(results)}")
    return 0 if killed.total() >= ENOUGH * len(results) else 1


def chosen(names: Sequence[str]) -> list[Mutant]:
    if not names:
        return list(MUTANTS)
    by_name = {mutant.name: mutant for mutant in MUTANTS} | {str(number): mutant for mutant, number in NUMBERS.items()}
    if unknown := [name for name in names if name not in by_name]:
        sys.exit(f"no such mutant: {', '.join(unknown)}; --list shows them")
    return [by_name[name] for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names or numbers of mutants; all of them otherwise")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    mutants = chosen(arguments.names)
    if arguments.list:
        for mutant in mutants:
            print(f"{NUMBERS[mutant]:3}  {mutant.name}: {mutant.what} ({mutant.file})")
        return 0
    tree = copy_tree()
    compile_choices(tree)
    free: queue.Queue[Path] = queue.Queue()
    for number in range(arguments.jobs):
        free.put(copy_for_worker(tree, number))

    def in_a_copy(work, *given):
        """Calls work with a copy that nobody else uses meanwhile."""
        worker = free.get()
        try:
            return work(*given, worker)
        finally:
            free.put(worker)

    def is_good(test: str, worker: Path) -> bool:
        start = time.monotonic()
        good = passes(worker, test)
        print(f"without any mistake: {test} {'passes' if good else 'FAILS'} ({time.monotonic() - start:.0f} s)", flush=True)
        return good

    def try_out(mutant: Mutant, worker: Path) -> str | None:
        start = time.monotonic()
        test = noticed_by(mutant, worker)
        told = f"noticed by {test}" if test else "SURVIVED"
        print(f"{NUMBERS[mutant]:3}  {mutant.name}: {told} ({time.monotonic() - start:.0f} s)", flush=True)
        return test

    with ThreadPoolExecutor(arguments.jobs) as pool:
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        if not all(list(pool.map(lambda test: in_a_copy(is_good, test), tests))):
            return 1
        return report(dict(zip(mutants, pool.map(lambda mutant: in_a_copy(try_out, mutant), mutants), strict=True)))


if __name__ == "__main__":
    sys.exit(main())
