"""`make faults`: every fault in its long form, one row each, and docs/faults.md.

Arguments are parts of names (`make faults FAULTS="01 killed"`): only what matches is run, and
docs/faults.md is then left alone.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.faults.campaign import Result, faults, inject

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"


def main(wanted: list[str]) -> int:
    torch.set_num_threads(1)
    logging.getLogger("dseqjepa").addHandler(logging.NullHandler())  # warnings that were asked for
    sys.path.append(str(ROOT / "benchmarks"))  # as the tests have it
    chosen = [f for f in faults() if not wanted or any(part in f.name for part in wanted)]
    width = max(len(f.title) for f in chosen)
    began = time.perf_counter()
    results = []
    for one in chosen:
        result = inject(one, full=True)
        results.append(result)
        print(
            f"{one.row:3d}  {one.title:{width}}  tried {result.tried:4d}  "
            f"survived {result.survived:4d}  {result.seconds:7.1f} s",
            flush=True,
        )
        for failure in result.failures:
            print(failure, file=sys.stderr, flush=True)
    if not wanted:
        PAGE.write_text(page(results, time.perf_counter() - began))
    return 0 if all(result.held for result in results) else 1


def page(results: list[Result], seconds: float) -> str:
    """docs/faults.md: what was injected, how often, and what became of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        "# Fault injection",
        "",
        "Every fault is injected for real: real processes, real signals, real files, two ranks",
        "with gloo. `make faults` runs the campaign and writes this page; the tests run a shorter",
        "form of each fault. The numbers select faults: `make faults FAULTS=07`.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {seconds / 60:.0f} minutes on a machine with "
        f"{os.cpu_count()} cores ({platform.machine()}) and {memory:.0f} GiB, Linux, "
        f"Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        "| row | fault | injected | survived | seconds |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        survived = str(result.survived) if result.held else f"**{result.survived}**"
        one = result.fault
        lines.append(
            f"| {one.row} | {one.title} | {result.tried} | {survived} | {result.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
