"""Processes: signals at any point, ranks that die or hang, workers that die."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dseqjepa.train import checkpoint
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.loop import Trainer
from dseqjepa.train.pretrain import pretrain
from tests.children import ends, start, start_ranks
from tests.faults.campaign import Attempts, fault
from tests.faults.resume import log_of
from tests.train.tiny_runs import STEPS, Pictures, assert_same_run, run_config, train

CONFIG = ("checkpoint.every_steps=4", "log.every_steps=3", "probe.every_epochs=1")
WAIT_S = 4.0
"""`runtime.timeout_s` of the runs here."""


def probe(encoder: Any) -> tuple[dict[str, float], str]:
    return {"probe_knn": float(encoder.norm.weight.detach().sum())}, "probed"


def train_here(out: Path, resume: bool) -> None:
    train(run_config("dseq", *CONFIG), out, resume=resume, probe=probe)


def train_and_signal(out: Path, where: str, numbers: list[int], number: int, pause: float) -> None:
    """In a child: signals come at one place of the run, the first time that `number` things have
    happened there."""
    happened = 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    def interrupt(*_: Any) -> None:
        nonlocal happened
        happened += 1
        if happened == number:
            for sent in numbers:
                os.kill(os.getpid(), sent)
                time.sleep(pause)

    def before(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            interrupt()
            return original(*arguments, **settings)

        return call

    if where == "step":
        Trainer._next = before(Trainer._next)  # type: ignore[method-assign]
    elif where == "save":
        checkpoint.save_file = before(checkpoint.save_file)
    seen = before(probe) if where == "evaluation" else probe
    train(run_config("dseq", *CONFIG), out, probe=seen)


PLACES = [("step", 1), ("step", 9), ("evaluation", 1), ("evaluation", 3), ("save", 3), ("save", 17)]


@fault(13, "SIGTERM during a step, an evaluation, a save: exit 143, resumable", quick=3, full=18)
def terminated(attempts: Attempts) -> None:
    whole = attempts.folder / "whole"
    train_here(whole, False)
    places = PLACES if attempts.full else PLACES[1::2]
    for attempt in range(attempts.count):
        where, number = places[attempt % len(places)]
        number = min(number + attempt // len(places), 4 if where == "evaluation" else STEPS)
        with attempts.attempt(f"in {where} {number}"):
            out = attempts.folder / str(attempt)
            log = attempts.folder / f"log {attempt}"
            arguments = (out, where, [signal.SIGTERM], number, 0.0)
            assert ends([start(train_and_signal, *arguments, log=log)], 240) == [143], (
                log.read_text()
            )
            last = (out / "log.txt").read_text().splitlines()[-1]
            step = open_checkpoint(out).step
            assert last == f"stopped by SIGTERM at step {step}; resume=true continues"
            train_here(out, True)
            assert_same_run(whole, out)


@fault(13, "A second SIGTERM, or SIGINT: immediate exit, no partial files", quick=4, full=24)
def at_once(attempts: Attempts) -> None:
    whole = attempts.folder / "whole"
    train_here(whole, False)
    ways = [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)]
    places = [("step", 9), ("evaluation", 2), ("save", 17), ("save", 20)]
    for attempt in range(attempts.count):
        (where, number), numbers = places[attempt % 4], ways[attempt % 3]
        with attempts.attempt(f"{[s.name for s in numbers]} in {where} {number}"):
            out = attempts.folder / str(attempt)
            log = attempts.folder / f"log {attempt}"
            arguments = (out, where, [int(s) for s in numbers], number, 0.1)
            child = start(train_and_signal, *arguments, log=log)
            expected = 143 if numbers[-1] == signal.SIGTERM else 130
            assert ends([child], 240) == [expected], log.read_text()
            assert "stopped by SIGTERM" not in (out / "log.txt").read_text()
            open_checkpoint(out)
            train_here(out, True)
            assert_same_run(whole, out)


def train_and_lose(out: Path, what: str, number: int) -> None:
    """In a child: with its batch of that number it loses its terminal, or its standard output."""
    original, seen = Trainer._next, 0
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have it ignored
    if what == "pipe":
        reader, writer = os.pipe()
        os.dup2(writer, 1)

    def next_batch(self: Trainer, *arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            os.close(reader) if what == "pipe" else os.kill(os.getpid(), signal.SIGHUP)
        return original(self, *arguments)

    Trainer._next = next_batch  # type: ignore[method-assign]
    pretrain(run_config("dseq", *CONFIG), out, source=Pictures(), probe=probe)


@fault(13, "A closed terminal, a closed pipe: saved, or unaffected", quick=2, full=12)
def terminal_lost(attempts: Attempts) -> None:
    whole = attempts.folder / "whole"
    train_here(whole, False)
    for attempt in range(attempts.count):
        what, number = ("terminal", "pipe")[attempt % 2], 2 + 3 * (attempt // 2)
        with attempts.attempt(f"{what} at batch {number}"):
            out, log = attempts.folder / str(attempt), attempts.folder / f"log {attempt}"
            child = start(train_and_lose, out, what, number, log=log)
            if what == "terminal":
                assert ends([child], 240) == [143], log.read_text()
                last = (out / "log.txt").read_text().splitlines()[-1]
                assert last == f"stopped by SIGHUP at step {number}; resume=true continues"
                train_here(out, True)
            else:
                assert ends([child], 240) == [0], log.read_text()
                assert "the console is closed (Broken pipe)" in (out / "log.txt").read_text()
            assert_same_run(whole, out)


class Breaks(Pictures):
    """A source with a bug that one rank meets."""

    def image(self, index: int) -> Tensor:
        if index == 11:
            raise ZeroDivisionError("a bug in image 11")
        return super().image(index)


def rank_with(out: Path, fate: str, rank: int, step: int) -> None:
    """In a child, as one of two ranks: at a step something happens to one of them."""
    original = Trainer._next

    def next_batch(self: Trainer, *arguments: Any) -> Any:
        if self.step == step and self.ranks.rank == rank:
            if fate in ("SIGTERM", "SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), signal.Signals[fate])
            elif fate == "sleep":
                time.sleep(60)
            elif fate == "exception":
                raise ZeroDivisionError("a bug on this rank")
        return original(self, *arguments)

    Trainer._next = next_batch  # type: ignore[method-assign]
    settings = [f"runtime.timeout_s={WAIT_S}", "optim.epochs=40", *CONFIG]
    train(run_config("dseq", *settings), out)


FATES = [
    ("SIGTERM", 1, 7, ""),
    ("SIGKILL", 1, 7, "rank 1 died or is frozen"),
    ("SIGSTOP", 1, 7, "rank 1 died or is frozen"),
    ("exception", 1, 7, "rank 1 failed: a bug on this rank"),
    ("SIGKILL", 0, 7, "rank 0"),
    ("sleep", 1, 7, "rank 1 did not come on in time"),
    ("SIGTERM", 0, 11, ""),
    ("SIGSTOP", 0, 7, "rank 0"),
    ("exception", 0, 3, "rank 0 failed: a bug on this rank"),
    ("SIGKILL", 1, 0, "rank 1 died or is frozen"),
]


@fault(
    14,
    "A rank is stopped, killed, frozen, late or broken: it is named, none hangs",
    quick=5,
    full=20,
)
def one_rank(attempts: Attempts) -> None:
    for attempt in range(attempts.count):
        fate, rank, step, said = FATES[attempt % len(FATES)]
        with attempts.attempt(f"{fate} on rank {rank} at step {step}"):
            out, log = attempts.folder / str(attempt), attempts.folder / f"log {attempt}"
            children = start_ranks(2, rank_with, out, fate, rank, step, log=log)
            other = children[1 - rank]
            if fate == "SIGTERM":
                assert ends(children, 240) == [143, 143], log_of(log)
                stopped = [f"stopped by SIGTERM at step {step + 1}; resume=true continues"]
                assert (out / "log.txt").read_text().splitlines()[-1:] == stopped
                assert open_checkpoint(out).step == step + 1
                continue
            wait_for_step(out, step)
            began = time.monotonic()
            code = ends([other], WAIT_S + 20)
            took = time.monotonic() - began
            ends([children[rank]], 0.1)
            text = log.with_name(f"{log.name}.{1 - rank}").read_text()
            assert code == [1], text
            assert took < WAIT_S + 5, f"{took:.1f} s"
            assert said in text.splitlines()[-1], text
            assert "resume=true continues from the last checkpoint" in text
            open_checkpoint(out)


def wait_for_step(out: Path, step: int) -> None:
    """Until the run has come to what happens at this step, more or less: to the save before."""
    end = time.monotonic() + 60
    saved = step // 4 * 4
    while not (out / "checkpoints" / f"step-{saved:08d}" / "state.json").exists():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)


UNLIKE = (
    "optim.lr=0.01", "runtime.seed=3", "data.crop_scale=[0.5,1]", "ema.start=0.9",
    "method.order=inverse", "data.image_size=48", "method.name=ijepa", "runtime.strategy=fsdp",
)  # fmt: skip


def rank_unlike(out: Path, setting: str) -> None:
    """In a child, as one of two ranks: the second was started with another setting."""
    own = [setting] if os.environ["RANK"] == "1" else []
    train(run_config("dseq", "runtime.timeout_s=60", *own), out)


@fault(14, "Ranks started with different settings: named by key and rank", quick=1, full=8)
def unlike_ranks(attempts: Attempts) -> None:
    for attempt in range(attempts.count):
        setting = UNLIKE[attempt % len(UNLIKE)]
        with attempts.attempt(setting):
            out, log = attempts.folder / str(attempt), attempts.folder / f"log {attempt}"
            children = start_ranks(2, rank_unlike, out, setting, log=log)
            assert ends(children, 240) == [2, 2], log_of(log)
            for rank in range(2):
                text = log.with_name(f"{log.name}.{rank}").read_text()
                assert f"{setting.partition('=')[0]} is " in text.splitlines()[-1]
                assert text.endswith(" on rank 1\n")
            assert not out.exists()


def train_with_readers(out: Path, fate: str) -> None:
    """In a child: a process that reads images is killed, or raises."""
    source = Breaks() if fate == "raises" else Pictures()
    original, seen = Trainer._next, 0

    def next_batch(self: Trainer, *arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 9 and fate == "killed":
            readers: Any = self.loader._processes
            os.kill(readers._iterator._workers[0].pid, signal.SIGKILL)
        return original(self, *arguments)

    Trainer._next = next_batch  # type: ignore[method-assign]
    train(run_config("dseq", "data.workers=2", "optim.epochs=400", *CONFIG), out, source)


@fault(
    15, "A loader worker killed, or raising: an error with the original traceback", quick=2, full=10
)
def readers(attempts: Attempts) -> None:
    for attempt in range(attempts.count):
        fate = ("killed", "raises")[attempt % 2]
        with attempts.attempt(fate):
            out, log = attempts.folder / str(attempt), attempts.folder / f"log {attempt}"
            assert ends([start(train_with_readers, out, fate, log=log)], 240) == [1]
            text = log.read_text()
            if fate == "killed":
                said = r"a data loader worker died \(process \d+ by signal 9\)"
                assert re.search(said, text.splitlines()[-1]), text
            else:
                assert "ZeroDivisionError: a bug in image 11" in text
                assert 'processes.py", line' in text
                assert "in image" in text
            open_checkpoint(out)
