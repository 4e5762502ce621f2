"""A pool that is killed at any moment and restarted computes every run once and drops none."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from dseqjepa.studies import pool
from dseqjepa.studies.cells import StudyCell, cells_of
from dseqjepa.studies.declare import Study
from dseqjepa.studies.folder import freeze
from dseqjepa.studies.pool import Pool
from tests.children import ends, start
from tests.studies import fakes
from tests.studies.tiny import tiny_study

FAKE = (sys.executable, "-S", fakes.__file__)


def work(study: Study, out: Path, jobs: int = 2, stale_s: float = 60.0) -> None:
    """In a child, or here: a pool whose commands are fakes."""
    pool.COMMAND = FAKE
    stopped_by = Pool(cells_of(study, out), jobs, quiet(), stale_s).run()
    if stopped_by:
        os._exit(128 + stopped_by)


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "COMMAND", FAKE)


def calls(cell: StudyCell) -> list[str]:
    path = cell.run / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


ONCE = ["pretrain state", "evaluate knn"]


def test_every_command_runs_once_and_a_second_start_runs_none(tmp_path: Path) -> None:
    study, _ = freeze(tiny_study(), tmp_path)
    cells = cells_of(study, tmp_path)
    assert {cell.state() for cell in cells} == {"left"}
    work(study, tmp_path)
    work(study, tmp_path)
    assert [calls(cell) for cell in cells] == [ONCE] * 6
    assert {cell.state() for cell in cells} == {"done"}
    assert not list((tmp_path / "leases").glob("*.json"))
    (tmp_path / "cells/scenes/ordered/seed-1/evaluations/knn.json").write_text("damaged")
    work(study, tmp_path)
    counted = Counter(line for cell in cells for line in calls(cell))
    assert counted == {"pretrain state": 6, "evaluate knn": 7}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_pool_that_is_killed_resumes_and_nothing_is_computed_twice(
    how: signal.Signals, tmp_path: Path
) -> None:
    study, _ = freeze(tiny_study(), tmp_path)
    cells = cells_of(study, tmp_path)
    moments = random.Random(int(how))
    for attempt in range(4):
        child = start(work, study, tmp_path, log=tmp_path / f"log{attempt}", FAKE_SECONDS="0.3")
        time.sleep(moments.uniform(0.4, 1.5))
        os.kill(child.pid, how)
        assert ends([child], 60)[0] in (-how, 128 + how, 0)
    last = start(work, study, tmp_path, log=tmp_path / "log", FAKE_SECONDS="0.1")
    assert ends([last], 120) == [0], (tmp_path / "log").read_text()
    assert [calls(cell) for cell in cells] == [ONCE] * 6
    assert not list((tmp_path / "failed").iterdir())


def test_no_command_outlives_a_pool_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = freeze(tiny_study(), tmp_path)
    monkeypatch.setenv("FAKE_SECONDS", "30")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    failing = Pool(cells_of(study, tmp_path), 2, quiet(), stale_s=0.4)
    started: list[subprocess.Popen[bytes]] = []

    def renew() -> None:
        started.extend(worker.process for worker in failing.workers)
        full()

    monkeypatch.setattr(failing, "_renew", renew)
    with pytest.raises(OSError, match="No space left"):
        failing.run()
    assert started
    assert all(process.returncode is not None for process in started)


def test_a_pool_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        study, _ = freeze(tiny_study(), tmp_path)
        hearing = Pool(cells_of(study, tmp_path), 2, quiet())
        with pool._signals(hearing):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
        assert hearing.stopped_by == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_pools_share_a_folder(tmp_path: Path) -> None:
    study, _ = freeze(tiny_study(seeds=[0, 1, 2, 3]), tmp_path)
    logs = [tmp_path / f"log{n}" for n in range(3)]
    children = [start(work, study, tmp_path, 1, log=log) for log in logs]
    assert ends(children, 120) == [0, 0, 0], [log.read_text() for log in logs]
    assert [calls(cell) for cell in cells_of(study, tmp_path)] == [ONCE] * 8


def test_a_failure_is_listed_and_tried_again_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = freeze(tiny_study(), tmp_path)
    cells = cells_of(study, tmp_path)
    bad = next(cell for cell in cells if cell.name == "scenes/inverse/seed-1")
    monkeypatch.setenv("FAKE_FAILS", bad.name)
    console = quiet()
    Pool(cells, 2, console).run()
    assert "scenes/inverse/seed-1: pretrain failed with exit code 1: dseqjepa: it went wrong" in (
        console.file.getvalue()  # type: ignore[attr-defined]
    )
    assert [cell.state() for cell in cells].count("failed") == 1
    assert calls(bad) == []
    monkeypatch.delenv("FAKE_FAILS")
    Pool(cells, 2, quiet()).run()
    assert bad.state() == "failed", "nobody asked for it"
    bad.failure.unlink()
    Pool(cells, 2, quiet()).run()
    assert [calls(cell) for cell in cells] == [ONCE] * 6


def test_threads_are_shared_out_and_the_table_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = freeze(tiny_study(), tmp_path)
    cells = cells_of(study, tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [Pool(cells, jobs, quiet()).threads for jobs in (1, 2, 3, 16)] == [8, 4, 2, 1]
    one = Pool(cells[:1], 1, quiet())
    one.run()
    several = Pool(cells, 2, quiet())
    console = Console(file=io.StringIO(), width=120)
    console.print(several.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 6 runs done, 5 left" in text
    lines = [line.split() for line in text.splitlines() if "scenes" in line]
    assert [line[3:-1:2] for line in lines] == [
        ["ordered", "1", "0", "2", "0", "52.0"],
        ["inverse", "0", "0", "3", "0"],
    ]
