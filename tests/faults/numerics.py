"""Numerics: non-finite values, spikes, blank images, collapse."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import health
import numpy as np
import pytest
import torch
from PIL import Image

from dseqjepa.config import Config
from dseqjepa.methods import ordered as dseq_module
from dseqjepa.model.look import Look, look_for_saliency
from dseqjepa.train.loop import Trainer
from dseqjepa.train.monitor import verdicts
from tests.children import ends, run_ranks, start
from tests.faults.campaign import Attempts, fault
from tests.faults.commands import lines, pretrain
from tests.tiny import PAPER
from tests.train.test_guard import FAULTS, assert_untouched, at_steps, changed_loss, skipped
from tests.train.tiny_runs import Pictures, metrics, run_config, train

JUMPS = {"jump": changed_loss(lambda loss, _: 200 * loss)}
EVERY_STEP = ["checkpoint.every_steps=1", "checkpoint.keep=99", "log.every_steps=1"]


def run_with(fault_of: Callable[[], Any], steps: set[int], out: Path, *settings: str) -> Path:
    """A run in which the fault is on in these steps."""
    method = settings[0]
    with pytest.MonkeyPatch.context() as patch:
        at_steps(patch, fault_of, steps)
        return train(run_config(method, *EVERY_STEP, *settings[1:]), out)


@fault(18, "NaN or Inf in a loss, a gradient or a saliency map", quick=5, full=60)
def not_finite(attempts: Attempts) -> None:
    """No update: weights, optimizer, EMA and buffers are bit for bit what they were."""
    for number in range(attempts.count):
        name = list(FAULTS)[number % len(FAULTS)]
        method = "dseq" if name == "saliency" else ("cjepa", "dseq", "ijepa")[number % 3]
        step = 1 + number // 5 % 12
        accumulate = 1 + number % 2
        with attempts.attempt(f"{name} in {method} at step {step}, {accumulate} micro-batches"):
            out = attempts.folder / str(number)
            run_with(
                FAULTS[name][0], {step}, out, method, f"optim.accumulate={accumulate}",
                "optim.epochs=3",
            )  # fmt: skip
            assert_untouched(out, step)
            (entry,) = skipped(out)
            assert entry["step"] == step
            assert len(entry["images"]) == 8
            assert all(math.isfinite(line["loss"]) for line in metrics(out))


def train_with_fault_on_one_rank(
    name: str, rank: int, steps: set[int], config: Config, out: Path
) -> None:
    """In a child: the fault is on in these steps, on one rank of the run."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == str(rank):
            makes = JUMPS | {key: make for key, (make, _) in FAULTS.items()}
            at_steps(patch, makes[name], steps)
        train(config, out)


@fault(18, "NaN, Inf or a spike on one rank of two: both skip the step", quick=2, full=14)
def on_one_rank(attempts: Attempts) -> None:
    """The images of both ranks are written down, the state is bit for bit what it was, and the run
    continues to its end. With whole parameters on each rank, and with spread ones."""
    names = ["saliency", "jump"] if not attempts.full else [*FAULTS, *JUMPS]
    for number in range(attempts.count):
        name, rank = names[number % len(names)], 1 - number % 2
        strategy = ("ddp", "fsdp")[number // len(names) % 2]
        with attempts.attempt(f"{name} on rank {rank}, {strategy}"):
            out = attempts.folder / str(number)
            calm = ["guard.window=8", "optim.lr=1e-5", "optim.start_lr=1e-5"]
            config = run_config("dseq", *EVERY_STEP, *calm).with_(runtime={"strategy": strategy})
            run_ranks(
                2, train_with_fault_on_one_rank, name, rank, {12}, config, out,
                log=attempts.folder / f"log-{number}",
            )  # fmt: skip
            entry = next(entry for entry in skipped(out) if entry["step"] == 12)
            assert len(set(entry["images"])) == 8
            assert_untouched(out, 12)
            assert [line["step"] for line in metrics(out)][-1] == 20


@fault(19, "A spike in the loss or the gradient", quick=2, full=20)
def spikes(attempts: Attempts) -> None:
    """With a window of 12 steps: a step fifty times as large is left out and counted."""
    for number in range(attempts.count):
        step = 14 + number // 2 % 6
        with attempts.attempt(f"number {number} at step {step}"):
            grow = changed_loss(
                (lambda loss, _: loss + 50) if number % 2 else (lambda loss, _: 50 * loss)
            )
            out = attempts.folder / str(number)
            calm = ["guard.window=12", "optim.lr=1e-5", "optim.start_lr=1e-5"]
            run_with(grow, {step}, out, "ijepa", *calm, f"runtime.seed={number}")
            assert step in [entry["step"] for entry in skipped(out)]
            assert_untouched(out, step)
            assert metrics(out)[-1]["skipped"] == len(skipped(out))


def plain(folder: Path, draw: Callable[[int], np.ndarray]) -> Path:
    folder.mkdir()
    for index in range(40):
        Image.fromarray(draw(index)).save(folder / f"{index}.png")
    return folder


def half_and_half(index: int) -> np.ndarray:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    return image


@fault(20, "Constant images, flat saliency, one region, non-square grids", quick=5, full=9)
def nothing_to_see(attempts: Attempts) -> None:
    """The loss stays finite, and images without regions are counted."""
    cases: dict[str, tuple[Callable[[int], np.ndarray], list[str]]] = {
        "black images": (lambda index: np.zeros((40, 40, 3), np.uint8), []),
        "images of one colour each": (
            lambda index: np.full((40, 40, 3), 6 * index, np.uint8),
            ["method.curriculum.start=1.0"],
        ),
        "a wide grid": (
            lambda index: np.random.default_rng(index).integers(0, 256, (40, 90, 3), np.uint8),
            ["data.image_size=[16,64]", "method.curriculum.start=1.0"],
        ),
        "a grid of one row": (
            lambda index: np.random.default_rng(index).integers(0, 256, (40, 90, 3), np.uint8),
            ["data.image_size=[8,64]", "method.curriculum.start=1.0"],
        ),
        "no region is large enough": (
            lambda index: np.random.default_rng(index).integers(0, 256, (40, 40, 3), np.uint8),
            [*PAPER, "method.regions.min_area=1.0", "method.curriculum.start=1.0"],
        ),
        "a tall grid": (half_and_half, ["data.image_size=[64,16]"]),
        "two regions at most": (half_and_half, ["method.regions.count=2"]),
        "causal contexts of black images": (
            lambda index: np.zeros((40, 40, 3), np.uint8),
            ["method.context=causal", "method.curriculum.unit=region"],
        ),
        "label-free Grad-CAM of black images": (
            lambda index: np.zeros((40, 40, 3), np.uint8),
            ["method.saliency.kind=grad_cam", "method.curriculum.start=1.0"],
        ),
    }
    for number, (name, (draw, settings)) in enumerate(list(cases.items())[: attempts.count]):
        with attempts.attempt(name):
            folder = plain(attempts.folder / f"pictures-{number}", draw)
            out = attempts.folder / str(number)
            said = pretrain(folder, out, *settings)
            assert said.code == 0, said
            told = lines(out / "metrics.jsonl")
            assert len(told) == 10
            numbers = [x for line in told for x in line.values() if not isinstance(x, list)]
            assert all(map(math.isfinite, numbers))
            assert all(0 <= line["empty_share"] <= 1 for line in told)
            if name == "no region is large enough":
                assert {line["empty_share"] for line in told} == {1.0}
                assert "100% of the images have no region" in said.out
    with attempts.attempt("a saliency map that is flat"):

        def look(*arguments: Any, **more: Any) -> Look:
            seen = look_for_saliency(*arguments, **more)
            assert seen.saliency_BN is not None
            return replace(seen, saliency_BN=torch.zeros_like(seen.saliency_BN))

        fault_of = lambda: (dseq_module, "look_for_saliency", look)  # noqa: E731
        out = run_with(fault_of, set(range(99)), attempts.folder / "flat", "dseq", *PAPER)
        assert {line["empty_share"] for line in metrics(out)} == {1.0}
        assert all(math.isfinite(line["loss"]) for line in metrics(out))


TINY_HEALTH = (*health.SIZE, "data.batch_size=32", "model.depth=2")


@fault(21, "Collapse: alarm if and only if there is one", quick=2, full=16)
def collapse(attempts: Attempts) -> None:
    """EMA momentum 0 without stop-gradient raises the alarm; five healthy seeds of both methods
    raise none. `make faults` also runs the other ways to break a run of docs/health.md."""
    chosen = [("no-stop-gradient", 0), ("scenes-ijepa", 0)]
    if attempts.full:
        chosen = [(kind, seed) for kind in ("scenes-dseq", "scenes-ijepa") for seed in range(5)]
        chosen += [(kind, 0) for kind in EASY_TO_SEE]
    steps = health.STEPS if attempts.full else 40
    health.scenes.cache_clear()
    for kind, seed in chosen:
        with attempts.attempt(f"{kind}, seed {seed}"):
            out = attempts.folder / f"{kind}-{seed}"
            size = health.SIZE if attempts.full else TINY_HEALTH
            scenes = health.SCENES if attempts.full else 320
            with mock.patch.multiple(health, STEPS=steps, SIZE=size, SCENES=scenes):
                health.train(health.KINDS[kind], seed, out, None)
            told = verdicts(metrics(out))
            alarms = [step for step, verdict in told.items() if verdict.alarm]
            assert bool(alarms) == bool(health.KINDS[kind].broken), [str(v) for v in told.values()]


EASY_TO_SEE = ("no-stop-gradient", "momentum-0", "lr-too-high", "no-regularizer-batch-8",
               "no-regularizer", "blind-target")  # fmt: skip


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train_and_measure(steps: int, workers: int, out: Path, report: Path) -> None:
    """In a child: memory and open files at twenty moments of a run."""
    take_step, seen = Trainer._train_step, []

    def step(trainer: Trainer, *arguments: Any) -> None:
        take_step(trainer, *arguments)
        if trainer.step % (steps // 20) == 0:
            gc.collect()
            seen.append((resident_mib(), len(os.listdir("/proc/self/fd"))))

    settings = [f"optim.epochs={steps // 5}", f"data.workers={workers}"]
    with mock.patch.object(Trainer, "_train_step", step):
        train(run_config("dseq", "checkpoint.every_epochs=20", *settings), out, Pictures())
    report.write_text(json.dumps(seen))


@fault(28, "2,000 steps: memory and open files", quick=1, full=2)
def endurance(attempts: Attempts) -> None:
    """After the first tenth neither grows (the quick form: 100 steps). oneDNN, and what
    torch has before it, keep a kernel for each of the last 1,024 shapes they have met, and packed
    batches have many; here they keep eight, so that what is measured is ours."""
    few = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
    steps = 2000 if attempts.full else 100
    for workers in (0, 2) if attempts.full else (0,):
        with attempts.attempt(f"{steps} steps, {workers} workers"):
            report, log = (attempts.folder / f"{what}-{workers}" for what in ("report", "log"))
            arguments = (steps, workers, attempts.folder / f"run-{workers}", report)
            child = start(train_and_measure, *arguments, log=log, **few)
            assert ends([child], 600) == [0], log.read_text()
            seen = json.loads(report.read_text())
            assert len(seen) == 20
            memory, files = zip(*seen[2:], strict=True)
            grown = np.polyfit(range(len(memory)), memory, 1)[0] * len(memory)
            assert grown < 4, f"{grown:.1f} MiB more: {[round(m, 1) for m in memory]}"
            assert max(files) == min(files), files
            print(f"{steps} steps, {workers} workers: {grown:+.1f} MiB, {files[0]} open files")
