"""The fault campaign: what is registered here is injected for real, counted and reported.

A fault is a function of `Attempts`. It says how often it tried and, attempt by attempt, whether
what had to hold did hold:

    @fault(1, "SIGKILL at random moments while saving", quick=6, full=200)
    def killed_while_saving(attempts: Attempts) -> None:
        for number in range(attempts.count):
            with attempts.attempt(f"kill {number}"):
                assert ...

The tests run each with its `quick` count (`tests/faults/test_faults.py`), `make faults` with its
`full` one. A topic is a file beside this one; it is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tests.faults


@dataclass
class Attempts:
    """How often a fault is to be tried, where, and what came of it."""

    count: int
    """How many attempts are wanted, where the fault has a number to choose."""
    folder: Path
    """An empty folder of this fault's own."""
    full: bool = False
    """True in `make faults`: an attempt may take long."""
    tried: int = 0
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One attempt: it survived if the block ends without an exception."""
        self.tried += 1
        try:
            yield
        except (Exception, pytest.fail.Exception):  # failed attempts are what is to be counted
            self.failures.append(f"{what}\n{traceback.format_exc()}")

    def place(self, name: object) -> Path:
        """A new empty folder inside the fault's own."""
        path = self.folder / str(name)
        path.mkdir()
        return path

    @property
    def survived(self) -> int:
        return self.tried - len(self.failures)


@dataclass(frozen=True)
class Fault:
    row: int
    """Number of the kind of fault; several faults may share one."""
    title: str
    run: Callable[[Attempts], None]
    quick: int
    full: int

    @property
    def name(self) -> str:
        return f"{self.row:02d}-{self.run.__name__}"


@dataclass(frozen=True)
class Result:
    fault: Fault
    tried: int
    survived: int
    seconds: float
    failures: tuple[str, ...]

    @property
    def held(self) -> bool:
        return self.tried > 0 and self.survived == self.tried


_FAULTS: dict[str, Fault] = {}


def fault(
    row: int, title: str, *, quick: int = 1, full: int = 1
) -> Callable[[Callable[[Attempts], None]], Callable[[Attempts], None]]:
    """Register a fault. `quick` and `full` are the counts that it gets; a fault that goes through a
    fixed list of cases need not read them, but must try at least so many."""

    def register(run: Callable[[Attempts], None]) -> Callable[[Attempts], None]:
        new = Fault(row, title, run, quick, full)
        if new.name in _FAULTS:
            raise ValueError(f"two faults are called {new.name}")
        _FAULTS[new.name] = new
        return run

    return register


def faults() -> list[Fault]:
    """Every fault of every topic, by row."""
    for module in pkgutil.iter_modules(tests.faults.__path__):
        if not module.name.startswith(("test_", "__")):
            importlib.import_module(f"tests.faults.{module.name}")
    return [_FAULTS[name] for name in sorted(_FAULTS)]


def inject(chosen: Fault, *, full: bool, folder: Path | None = None) -> Result:
    """Try one fault. Fewer attempts than promised, or an error outside of them, are failures."""
    place = folder or Path(tempfile.mkdtemp(prefix="fault-"))
    attempts = Attempts(chosen.full if full else chosen.quick, place, full)
    began = time.perf_counter()
    try:
        chosen.run(attempts)
    except (Exception, pytest.fail.Exception):  # counted as failed, so that the others are run
        attempts.tried += 1
        attempts.failures.append(f"the fault itself\n{traceback.format_exc()}")
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
    seconds = time.perf_counter() - began
    if attempts.tried < attempts.count:
        attempts.failures.append(f"{attempts.tried} attempts instead of {attempts.count}")
    failures = tuple(attempts.failures)
    return Result(chosen, attempts.tried, max(attempts.survived, 0), seconds, failures)
