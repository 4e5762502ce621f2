"""The shard benchmark runs; the libraries it compares with may be missing."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import shards as benchmark

from tests.children import run_script

FILE = Path(benchmark.__file__)
HERE = [
    name
    for name in benchmark.BENCHMARKS
    if not any(library in name and find_spec(library) is None for library in benchmark.LIBRARIES)
]


def test_they_run_and_write_their_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    only = [word for name in HERE for word in ("--only", name)]
    command = (*only, "--smoke", "--json", str(out))
    done = run_script(FILE, *command, log=tmp_path / "log")
    assert done.code == 0, done.said
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == HERE
    assert all(row["ratio"] > 0 and row["name"] in done.said for row in rows)


def test_entropy_is_that_of_the_classes() -> None:
    assert benchmark.bits_of(np.repeat(np.arange(8), 5)) == pytest.approx(3.0)
    assert benchmark.bits_of(np.zeros(9, dtype=np.int64)) == 0.0
