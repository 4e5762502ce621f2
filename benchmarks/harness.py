"""Shared by all benchmarks: command line, alternating measurement of two sides, table and JSON.

A benchmark is a function of an `Effort` that returns a `Row`: two figures measured in one run, and
their ratio. Machines differ and drift, so only the ratio is meaningful.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Effort:
    """How much to measure. `smoke` shrinks a benchmark to a check that it runs, for the tests."""

    warmup: int
    repeats: int
    smoke: bool


FULL = Effort(warmup=2, repeats=5, smoke=False)
SMOKE = Effort(warmup=0, repeats=1, smoke=True)


@dataclass(frozen=True)
class Row:
    """One result. `ours` and `other` are medians in `unit`; `ratio` is the result, described by
    `what`; `low` and `high` are the smallest and largest ratio of the repeats."""

    name: str
    ours: float
    other: float
    ratio: float
    unit: str
    what: str
    low: float
    high: float


Benchmark = Callable[[str, Effort], Row]


def speedup(
    name: str, ours: Callable[[], object], other: Callable[[], object], effort: Effort, what: str
) -> Row:
    """Time both alternately, A B A B; the ratio is other / ours, the median over the pairs."""
    for _ in range(effort.warmup):
        ours()
        other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(effort.repeats)]
    return paired(name, pairs, [b / a for a, b in pairs], "s", what)


def paired(
    name: str,
    pairs: Sequence[tuple[float, float]],
    ratios: Sequence[float],
    unit: str,
    what: str,
) -> Row:
    """The row of repeated measurements (ours, other) and the ratio of each repeat."""
    ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ratios)
    return Row(name, ours, other, ratio, unit, what, min(ratios), max(ratios))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(
    description: str, benchmarks: Mapping[str, Benchmark], usual: Sequence[str] | None = None
) -> None:
    """Run the named benchmarks, or else the `usual` ones (by default all), printing each row when
    it is ready."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(benchmarks), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    options = parser.parse_args()
    if options.list:
        print(*benchmarks, sep="\n")
        return
    effort = SMOKE if options.smoke else FULL
    rows = []
    for name in options.only or usual or benchmarks:
        row = benchmarks[name](name, effort)
        rows.append(row)
        print(
            f"{row.name:28} {row.ratio:8.3f} ({row.low:.3f} - {row.high:.3f})  {row.what}: "
            f"ours {row.ours:.4g} {row.unit}, other {row.other:.4g} {row.unit}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
