"""Executes the runs of a study in parallel, each as a chain of ordinary commands in subprocesses.

Several pools, on one machine or many, share the runs of a folder by leases. After a pool is killed,
the next one continues from the runs' own files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from types import FrameType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dseqjepa.errors import printable
from dseqjepa.files import write_whole
from dseqjepa.studies.cells import Stage, StudyCell
from dseqjepa.studies.folder import STALE_S, Leases
from dseqjepa.train.clock import duration

COMMAND = (sys.executable, "-m", "dseqjepa")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = {128 + signal.SIGTERM, *(-number for number in STOPS), 128 + signal.SIGINT}
"""Exit codes of a command that was interrupted and can be resumed."""
LOOK_S, SEARCH_S, RENEW_S, DRAW_S = 0.1, 1.0, 10.0, 2.0


@dataclass
class _Worker:
    """A run in progress in this pool."""

    cell: StudyCell
    stage: Stage
    process: subprocess.Popen[bytes]
    since: float


class Pool:
    """`jobs` runs at a time, until all of `cells` are done or have failed.

    Args:
        cells: the runs that this pool may execute, in order.
        console: output for messages and the live table.
        stale_s: seconds after which a lease that is not renewed expires.
    """

    def __init__(
        self, cells: Sequence[StudyCell], jobs: int, console: Console, stale_s: float = STALE_S
    ) -> None:
        self.cells, self.jobs, self.console = cells, jobs, console
        self.leases = Leases(cells[0].out, stale_s)
        self.workers: list[_Worker] = []
        self.seconds: list[float] = []
        """Durations of the runs that this pool executed from beginning to end."""
        self.began: dict[str, float] = {}
        self.done: dict[str, dict[str, float]] = {}
        """Name of each finished run -> evaluation -> its first metric."""
        self.stopped_by: int | None = None
        self.renew_s = min(RENEW_S, stale_s / 4)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = max(1, (cores or 1) // jobs)

    def run(self) -> int | None:
        """Execute the runs; returns the signal that interrupted it, if any. Failures are recorded
        in files."""
        searched = renewed = drawn = 0.0
        with _signals(self), self._live() as live:
            try:
                while not self.stopped_by:
                    ended = [self._look_at(worker) for worker in list(self.workers)]
                    now = time.monotonic()
                    if len(self.workers) < self.jobs and (any(ended) or now - searched > SEARCH_S):
                        searched = now
                        if not self._start_one() and not self.workers and not self._left():
                            break
                    if now - renewed > self.renew_s:
                        renewed = now
                        self._renew()
                    if live is not None and now - drawn > DRAW_S:
                        drawn = now
                        live.update(self.table(), refresh=True)
                    time.sleep(LOOK_S)
            finally:  # nothing trains on without a pool, such as after a full disk
                self._stop()
            if live is not None:
                live.update(self.table(), refresh=True)
        return self.stopped_by

    def _state(self, cell: StudyCell) -> str:
        """`done`, `failed` or `left`; `done` is cached."""
        if cell.name in self.done:
            return "done"
        state = cell.state()
        if state == "done":
            self.done[cell.name] = {
                name: next(iter(cell.result(name)["metrics"].values()))["value"]
                for name in cell.study.evaluations
            }
        return state

    def _left(self) -> list[StudyCell]:
        return [cell for cell in self.cells if self._state(cell) == "left"]

    def _start_one(self) -> bool:
        """Start the first free run; False if there is none."""
        mine = {worker.cell.name for worker in self.workers}
        for cell in self._left():
            if cell.name in mine or not self.leases.take(cell):
                continue
            stage = next(cell.left(), None)
            if stage is None:  # another pool was faster
                self.leases.leave(cell)
                continue
            if not cell.run.exists():
                self.began[cell.name] = time.monotonic()
            self._start(cell, stage)
            return True
        return False

    def _start(self, cell: StudyCell, stage: Stage) -> None:
        threads = str(self.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [*COMMAND, *stage.arguments]
        with cell.log.open("ab") as log:
            log.write(f"$ dseqjepa {' '.join(stage.arguments)}\n".encode(errors="backslashreplace"))
            log.flush()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which forwards it
            )
        self.leases.renew(cell, process.pid)
        self.workers.append(_Worker(cell, stage, process, time.monotonic()))

    def _look_at(self, worker: _Worker) -> bool:
        """Check a worker and start its run's next command; True if the worker's run has ended."""
        code = worker.process.poll()
        if code is None:
            return False
        self.workers.remove(worker)
        cell, took = worker.cell, time.monotonic() - worker.since
        if code == 0 and worker.stage not in cell.left():
            self._say(f"{cell.name}: {worker.stage.name} done in {duration(took)}")
            following = next(cell.left(), None)
            if following is not None:
                self._start(cell, following)
                return False
            if cell.name in self.began:
                self.seconds.append(time.monotonic() - self.began[cell.name])
        elif code in STOPPED:
            self._say(f"{cell.name}: {worker.stage.name} was interrupted")
        else:
            self._note_failure(cell, worker.stage, code)
        self.leases.leave(cell)
        return True

    def _note_failure(self, cell: StudyCell, stage: Stage, code: int) -> None:
        last = cell.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        why = printable(last)
        values = {"stage": stage.name, "code": code, "said": why, "log": str(cell.log)}
        write_whole(cell.failure, json.dumps(values, indent=1) + "\n")
        self._say(f"{cell.name}: {stage.name} failed with exit code {code}: {why}")

    def _renew(self) -> None:
        for worker in list(self.workers):
            if not self.leases.renew(worker.cell, worker.process.pid):
                self._say(f"{worker.cell.name}: taken over by another process")
                self.workers.remove(worker)
                worker.process.terminate()
                worker.process.wait()

    def _stop(self) -> None:
        """Stop all workers; pre-training saves a checkpoint first."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.wait()
        for worker in self.workers:
            self.leases.leave(worker.cell)
        self.workers.clear()

    # Output

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _live(self) -> Iterator[Live | None]:
        if not self.console.is_terminal:
            yield None
            return
        with Live(console=self.console, auto_refresh=False) as live:
            yield live

    def table(self) -> RenderableType:
        """Progress and current means, by data set and variant."""
        states = {cell.name: self._state(cell) for cell in self.cells}
        evaluations = list(self.cells[0].study.evaluations)
        table = Table("data", "variant", "done", "running", "left", "failed", *evaluations)
        mine = {worker.cell.name for worker in self.workers}
        lines: dict[tuple[str, str], list[str]] = {}
        for cell in self.cells:
            lines.setdefault((cell.data, cell.variant), []).append(cell.name)
        for (data, variant), names in lines.items():
            found = [states[name] for name in names]
            running = len(mine & set(names))
            counts = [found.count("done"), running, found.count("left") - running]
            metrics = [self.done[name] for name in names if name in self.done]
            means = [
                f"{fmean(each[name] for each in metrics):.1f}" if metrics else ""
                for name in evaluations
            ]
            table.add_row(data, variant, *map(str, counts), str(found.count("failed")), *means)
        return Group(
            Text(f"{len(self.done)} of {len(states)} runs done, {self._eta(states)}"), table
        )

    def _eta(self, states: dict[str, str]) -> str:
        left = list(states.values()).count("left")
        if not self.seconds or not left:
            return f"{left} left"
        return f"{left} left, about {duration(left * fmean(self.seconds) / self.jobs)} here"


@contextmanager
def _signals(pool: Pool) -> Iterator[None]:
    def ask(number: int, _frame: FrameType | None) -> None:
        pool.stopped_by = number

    # Under nohup the terminal's end stays ignored.
    heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
