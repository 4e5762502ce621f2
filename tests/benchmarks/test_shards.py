"""The shard benchmark runs; the libraries it compares with may be missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import shards as benchmark

FILE = Path(benchmark.__file__)
HERE = [
    name
    for name in benchmark.BENCHMARKS
    if not any(library in name and find_spec(library) is None for library in benchmark.LIBRARIES)
]


def test_they_run_and_write_their_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    only = [word for name in HERE for word in ("--only", name)]
    command = [sys.executable, str(FILE), *only, "--smoke", "--json", str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == HERE
    assert all(row["ratio"] > 0 and row["name"] in printed for row in rows)


def test_entropy_is_that_of_the_classes() -> None:
    assert benchmark.bits_of(np.repeat(np.arange(8), 5)) == pytest.approx(3.0)
    assert benchmark.bits_of(np.zeros(9, dtype=np.int64)) == 0.0
