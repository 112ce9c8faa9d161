"""Takes one barrier, one wait (for the launch before, or for copies), or one half of one acquire-release atomic from the CUDA
kernels at a time.

The kernel tests must notice.

    python tests/native/mutate.py build/native/cuda_kernels_tsan [--jobs N] [--list] [--one-in K]

Nothing is compiled: GCNET_EMULATION_DROP tells the emulator which line of csrc/cuda to leave out, and ThreadSanitizer, a wrong
result or a deadlock tells that it was needed. Prints killed/total; fails unless all are killed. With --one-in K only every K-th
is tried; where it begins changes with the kernels, so that each of them has its turn.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
BARRIER = re.compile(r"\b(__sync(threads|warp)|cluster_barrier|wait_for_(previous_launch|copies|count))\(")
DEFINITION = re.compile(r"\bvoid (wait_for_|cluster_barrier)")
ORDERS = {
    "acquire": re.compile(r"\b(fetch_add_acq_rel|wait_for_count)\("),
    "release": re.compile(r"\b(fetch_add_acq_rel|add_release)\("),
}
LIKELY = {  # which group of tests notices a mutant in a file that begins like this; others are named as their group
    "global_context_tickets": "forward_tickets",
    "global_context_backward_tickets": "backward_tickets",
    "attention_pool_backward_row_items": "backward_tickets",  # which has its clusters
}
TIME_LIMIT = 120  # seconds; a mutant that hangs is a mutant that was noticed


def mutants() -> list[str]:
    """Every "file:line" of a barrier or wait and "file:line:half" of an order, as GCNET_EMULATION_DROP takes them."""
    found = []
    for path in sorted(CUDA.glob("*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.partition("//")[0]
            site = f"{path.name}:{number}"
            if BARRIER.search(code) and not DEFINITION.search(code):
                found.append(site)
            found += [f"{site}:{half}" for half, order in ORDERS.items() if order.search(code)]
    return found


def first_of(step: int) -> int:
    """The number of the first mutant that is tried: the same for the same kernels."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(CUDA.glob("*.cuh")))) % step


def groups(mutant: str | None) -> list[str]:
    """The groups of kernel tests; first the one that is likely to notice the mutant, because the rest is left out then."""
    every = re.findall(r'\{"(\w+)", test_', (Path(__file__).resolve().parent / "cuda" / "main.cpp").read_text())
    name = mutant or ""
    named = next((group for group in every if name.startswith(group)), "global_context")
    likely = next(
        (group for start, group in LIKELY.items() if name.startswith(start)), "flat_stages" if "flat" in name else named
    )
    return sorted(every, key=lambda group: group != likely)


def run(program: Path, mutant: str | None) -> subprocess.CompletedProcess[str]:
    """The kernel tests on small shapes, with the mutant's line left out."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "GCNET_EMULATION_DROP": mutant or ""}
    if "tickets" in (mutant or ""):  # a block that runs alone waits for nobody
        environment["GCNET_EMULATION_SCHEDULE"] = "round-robin"
    command = [str(program), "--small", *groups(mutant)]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "ran too long")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="cuda_kernels, built under ThreadSanitizer")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--one-in", type=int, default=1, metavar="K", help="try every K-th mutant")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    candidates = mutants()[first_of(arguments.one_in) :: arguments.one_in]
    if arguments.list:
        print(*candidates, sep="\n")
        return 0
    if arguments.one_in == 1:  # otherwise the tests beside this one have shown it
        unchanged = run(arguments.program, None)
        if unchanged.returncode != 0:
            print(f"the kernel tests fail without any mutation:\n{unchanged.stdout}{unchanged.stderr}")
            return 1
    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes = list(pool.map(lambda mutant: run(arguments.program, mutant).returncode, candidates))
    for mutant, code in zip(candidates, codes, strict=True):
        if code == 0:
            print(f"survived: {mutant}")
    killed = sum(code != 0 for code in codes)
    print(f"killed {killed}/{len(candidates)}")
    return 0 if candidates and killed == len(candidates) else 1


if __name__ == "__main__":
    sys.exit(main())
