"""`make faults`: every fault in its long form, one row each in docs/faults.md.

Arguments are parts of names (`make faults FAULTS="01 killed"`): only what matches is run, and the
other rows of docs/faults.md stay as they are.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.faults.campaign import Fault, Result, faults, inject

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"


def main(wanted: list[str]) -> int:
    torch.set_num_threads(1)
    logging.getLogger("dseqjepa").addHandler(logging.NullHandler())  # warnings that were asked for
    sys.path.append(str(ROOT / "benchmarks"))  # as the tests have it
    chosen = [f for f in faults() if not wanted or any(part in f.name for part in wanted)]
    if not chosen:
        print(f"no fault has {' or '.join(wanted)} in its name", file=sys.stderr)
        return 2
    width = max(len(f.title) for f in chosen)
    results = []
    for one in chosen:
        result = inject(one, full=True)
        results.append(result)
        print(
            f"{one.row:3d}  {one.title:{width}}  tried {result.tried:4d}  "
            f"survived {result.survived:4d}  {result.seconds:7.1f} s",
            flush=True,
        )
        old = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page(old, faults(), result), encoding="utf-8")
        for failure in result.failures:
            print(failure, file=sys.stderr, flush=True)
    return 0 if all(result.held for result in results) else 1


def page(old: str, known: list[Fault], result: Result) -> str:
    """docs/faults.md: what was injected, how often, and what became of it.

    Args:
        old: the page so far; the rows of other faults stay.
        known: the faults that may have a row.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    rows = {line.split(" | ")[1]: line for line in old.splitlines() if line.startswith("| ")}
    survived = str(result.survived) if result.held else f"**{result.survived}**"
    one = result.fault
    rows[one.title] = (
        f"| {one.row} | {one.title} | {result.tried} | {survived} | {result.seconds:.1f} "
        f"| {datetime.now(UTC):%Y-%m-%d} |"
    )
    lines = [
        "# Fault injection",
        "",
        "Every fault is injected for real: real processes, real signals, real files, two ranks",
        "with gloo. `make faults` runs the campaign and updates this page; the tests run a shorter",
        "form of each fault. A row's number, with two digits, selects its faults:",
        "`make faults FAULTS=07`; numbers without a row are not in use. *Survived* means that the",
        "program did what the row says; the [log](LOG.md) explains counts in bold.",
        "",
        f"The machine of the latest run has {os.cpu_count()} cores ({platform.machine()}) and "
        f"{memory:.0f} GiB, Linux, Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        "| row | fault | injected | survived | seconds | date |",
        "|---|---|---|---|---|---|",
        *(rows[one.title] for one in known if one.title in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
