"""Resume: interrupted anywhere, with other workers, ranks or data, against an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dseqjepa.config import Config
from dseqjepa.errors import InputError
from dseqjepa.train import checkpoint
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.loop import Trainer
from dseqjepa.train.pretrain import pretrain
from tests.children import ends, run_ranks, start, start_ranks
from tests.faults.campaign import Attempts, fault
from tests.train.tiny_runs import (
    IMAGES,
    PER_EPOCH,
    STEPS,
    Pictures,
    assert_same_run,
    metrics,
    quiet,
    run_config,
    timeless,
    train,
)

PARTS = 2
"""Micro-batches of a step, so that a cut can come between them."""


def config_of(workers: int, *settings: str) -> Config:
    own = ["checkpoint.every_steps=4", "log.every_steps=3", f"optim.accumulate={PARTS}"]
    return run_config("dseq", *own, f"data.workers={workers}", *settings)


def train_here(config: Config, out: Path, resume: bool) -> None:
    train(config, out, resume=resume)


def train_and_cut(config: Config, out: Path, batch: int, number: int, by: int) -> None:
    """In a child: the signal comes with the batch of that number, to this rank if it is `by`."""
    original, seen = Trainer._next, 0

    def next_batch(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == batch and by in (-1, int(os.environ["RANK"])):
            os.kill(os.getpid(), number)
        return original(*arguments)

    Trainer._next = next_batch  # type: ignore[method-assign]
    train(config, out)


def cut_and_resume(
    place: Path, workers: int, ranks: int, batch: int, number: signal.Signals
) -> tuple[Path, int]:
    """An interrupted run, resumed in new processes: its folder and the step it resumed from."""
    config = config_of(workers)
    out, log = place / "run", place / "log"
    # SIGTERM to one rank stops them all; a SIGKILL that takes the machine takes them all.
    by = ranks - 1 if number == signal.SIGTERM else -1
    children = start_ranks(ranks, train_and_cut, config, out, batch, number, by, log=log)
    expected = 143 if number == signal.SIGTERM else -signal.SIGKILL
    assert ends(children, 120) == [expected] * ranks, log_of(log)
    step = open_checkpoint(out).step
    run_ranks(ranks, train_here, config, out, True, log=log)
    return out, step


def log_of(log: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*")))


@fault(
    9,
    f"Interrupted at {STEPS} steps, also between micro-batches; workers 0 and 2, ranks 1 and 2",
    quick=4,
    full=4 * STEPS,
)
def cut_anywhere(attempts: Attempts) -> None:
    """Every step for every number of workers and ranks; by turns in the first micro-batch and
    between the two, by SIGTERM and by SIGKILL."""
    ways = list(product((0, 2), (1, 2)))
    cuts = [(step, *way) for way in ways for step in range(1, STEPS + 1)]
    if not attempts.full:  # first, last, the first of an epoch, and the last of one
        steps = (1, STEPS, PER_EPOCH + 1, 2 * PER_EPOCH)
        cuts = [(step, *way) for step, way in zip(steps, ways, strict=True)]
    whole: dict[int, Path] = {}
    for ranks in (1, 2):
        whole[ranks] = attempts.folder / f"whole {ranks}"
        log = attempts.folder / "log"
        run_ranks(ranks, train_here, config_of(0), whole[ranks], False, log=log)
    for number, (step, workers, ranks) in enumerate(cuts):
        by = signal.SIGTERM if number // 2 % 2 == 0 else signal.SIGKILL
        batch = PARTS * (step - 1) + 1 + number % 2
        with attempts.attempt(f"{by.name}, step {step}, {workers} workers, {ranks} ranks"):
            place = attempts.place(number)
            out, resumed = cut_and_resume(place, workers, ranks, batch, by)
            assert resumed == step if by == signal.SIGTERM else resumed < step
            assert_same_run(whole[ranks], out)


def train_and_list(config: Config, out: Path, resume: bool, stop_after: int, seen: Path) -> None:
    """In a child: every image is written down with the step that saw it."""
    original = Trainer._next

    def next_batch(self: Trainer, *arguments: Any) -> Any:
        batch = original(self, *arguments)
        with seen.with_name(f"{seen.name}.{self.ranks.rank}").open("a") as file:
            file.write(json.dumps([self.step, batch.index_B.tolist()]) + "\n")
        return batch

    Trainer._next = next_batch  # type: ignore[method-assign]
    train(config, out, resume=resume, stop_after=stop_after)


def seen_in_epochs(seen: Path) -> list[list[int]]:
    epochs: list[list[int]] = [[] for _ in range(STEPS // PER_EPOCH)]
    for path in seen.parent.glob(f"{seen.name}.*"):
        for line in path.read_text().splitlines():
            step, images = json.loads(line)
            epochs[step // PER_EPOCH] += images
    return epochs


@fault(10, "A different number of workers on resume: identical", quick=2, full=12)
def other_workers(attempts: Attempts) -> None:
    whole = train(config_of(0), attempts.folder / "whole")
    pairs = [(0, 2), (2, 1), (1, 0), (3, 2)]
    for number in range(attempts.count):
        before, after = pairs[number % len(pairs)]
        step = 1 + 7 * number % (STEPS - 1)
        with attempts.attempt(f"{before} workers up to step {step}, then {after}"):
            place = attempts.place(number)
            out, log = place / "run", place / "log"
            batch = PARTS * (step - 1) + 1
            arguments = (config_of(before), out, batch, signal.SIGTERM, 0)
            assert ends(start_ranks(1, train_and_cut, *arguments, log=log), 120) == [143]
            run_ranks(1, train_here, config_of(after), out, True, log=log)
            assert_same_run(whole, out)


@fault(
    10, "Two ranks, then one, and back: every sample once per epoch, and logged", quick=1, full=6
)
def other_ranks(attempts: Attempts) -> None:
    whole = train(config_of(0), attempts.folder / "whole")
    for number in range(attempts.count):
        first, second = (2, 1) if number % 2 == 0 else (1, 2)
        step = 7 + 2 * number
        with attempts.attempt(f"{first} ranks up to step {step}, then {second}"):
            place = attempts.place(number)
            out, log, seen = place / "run", place / "log", place / "seen"
            arguments = (config_of(0), out, False, step, seen)
            children = start_ranks(first, train_and_list, *arguments, log=log)
            assert ends(children, 120) == [143] * first, log_of(log)
            run_ranks(second, train_and_list, config_of(0), out, True, -1, seen, log=log)
            for images in seen_in_epochs(seen):
                assert sorted(images) == list(range(IMAGES))
            said = f"{second} ranks instead of {first}: steps see the same images as before"
            assert said in (out / "log.txt").read_text()
            for line, same in zip(timeless(whole), timeless(out), strict=True):
                assert line["step"] == same["step"]
                assert same["loss"] == pytest.approx(line["loss"], rel=1e-4)


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        pixels_HWC = Pictures().image(index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels_HWC).save(folder / f"{index:02d}.png")
    return folder


def train_and_die(config: Config, out: Path, number: int) -> None:
    """In a child: it is gone before the file of that number of its first save is written."""
    original, seen = checkpoint.save_file, 0

    def save_file(*arguments: Any) -> None:
        nonlocal seen
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        original(*arguments)

    checkpoint.save_file = save_file
    train(config, out)


@fault(33, "Killed before and during the first save: resume=auto restarts it", quick=2, full=10)
def killed_at_the_start(attempts: Attempts) -> None:
    config = config_of(0)
    whole = train(config, attempts.folder / "whole")
    for attempt in range(attempts.count):
        number = (2 * attempt) % 5
        with attempts.attempt(f"before file {number}"):
            out, log = attempts.folder / str(attempt), attempts.folder / f"log {attempt}"
            assert ends([start(train_and_die, config, out, number, log=log)], 240) == [-9]
            for way in ({}, {"resume": True}):
                with pytest.raises(InputError, match="resume=auto"):
                    train(config, out, **way)
            train(config, out, resume="auto")
            assert_same_run(whole, out)
            train(config, out, resume="auto")  # there is nothing left to do
            assert_same_run(whole, out)


@fault(11, "Files added, removed, replaced: refused, accepted by name", quick=3, full=3)
def other_data(attempts: Attempts) -> None:
    for kind in ("added", "removed", "replaced"):
        with attempts.attempt(kind):
            place = attempts.place(kind)
            folder, out = pictures(place / "pictures", 24), place / "run"
            config = run_config("ijepa", f"data.source={folder}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "_probe", lambda *_: signal.raise_signal(signal.SIGTERM))
                with pytest.raises(Exception, match=r"^$"):
                    pretrain(config, out, console=quiet())
            step, before = open_checkpoint(out).step, len(metrics(out))
            if kind == "removed":
                (folder / "07.png").unlink()
            else:
                name = "99.png" if kind == "added" else "07.png"
                Image.new("RGB", (90, 70), (200, 10, 10)).save(folder / name)
            with pytest.raises(InputError, match="allow_changed=data"):
                pretrain(config, out, resume=True, console=quiet())
            assert (open_checkpoint(out).step, len(metrics(out))) == (step, before)
            pretrain(config, out, resume=True, allow_changed=["data"], console=quiet())
            assert "changed images" in (out / "log.txt").read_text()
            assert open_checkpoint(out).step > step


@fault(12, "dseqjepa verify-resume, as a user runs it", quick=1, full=4)
def verify_resume(attempts: Attempts) -> None:
    choice = random.Random(0)
    for number in range(attempts.count):
        with attempts.attempt(f"number {number}"):
            path = attempts.folder / f"{number}.yaml"
            workers = number % 3
            path.write_text(config_of(workers, f"runtime.seed={choice.randrange(99)}").to_yaml())
            done = subprocess.run(
                [sys.executable, "-m", "dseqjepa", "verify-resume", str(path), "data=scenes",
                 "data.size=40", f"steps={4 + number}"],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            *rows, last = done.stdout.splitlines()[1:]
            assert last.startswith("exact:")
            assert len(rows) == 7
            assert all(row.endswith("identical") for row in rows)
