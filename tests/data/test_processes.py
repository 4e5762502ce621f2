"""Processes that a run has started do not outlive it, whatever ends it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dseqjepa.data import scenes
from dseqjepa.data.loader import Loader
from dseqjepa.data.transforms import TrainTransform
from tests.children import start
from tests.train.tiny_runs import Pictures


def tell(pids: list[int], told: Path) -> None:
    """Write them down, and wait to be killed."""
    partial = told.with_suffix(".partial")
    partial.write_text(" ".join(map(str, pids)))
    partial.rename(told)
    time.sleep(300)


def read(told: Path, method: str) -> None:
    """In a child: two processes read images for it."""
    multiprocessing.set_start_method(method, force=True)
    loader = Loader(Pictures(), TrainTransform((8, 8)), batch_size=4, seed=0, workers=2)
    batches = loader.batches(0)
    next(batches)
    readers: Any = loader._processes
    tell([worker.pid for worker in readers._iterator._workers], told)


def draw(told: Path, _method: str) -> None:
    """In a child: two processes draw scenes for it."""

    class Watched(ProcessPoolExecutor):
        def __exit__(self, *_: object) -> None:
            tell(list(self._processes), told)

    scenes.ProcessPoolExecutor = Watched  # type: ignore[misc]
    scenes.Scenes(64, size=32, seed=0, split="train").prepare(2)


@pytest.mark.parametrize(("work", "method"), [(read, "fork"), (read, "forkserver"), (draw, "")])
def test_they_end_when_the_run_is_killed(
    tmp_path: Path, work: Callable[[Path, str], None], method: str
) -> None:
    told, log = tmp_path / "pids", tmp_path / "log"
    run = start(work, told, method, log=log)
    wait_until(told.exists, log)
    pids = [int(pid) for pid in told.read_text().split()]
    assert len(pids) == 2
    assert all(map(lives, pids))
    run.kill()
    wait_until(lambda: not any(map(lives, pids)), log)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(done: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
