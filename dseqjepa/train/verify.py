"""Checks that resuming is exact, on this machine, with this data and config."""

from __future__ import annotations

import io
import multiprocessing
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dseqjepa.config import Config
from dseqjepa.errors import InputError, RunError, Stopped
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.log import CLOCK_KEYS
from dseqjepa.train.metrics import read_metrics
from dseqjepa.train.pretrain import pretrain

STEPS = 6
FILES = ("target", "context", "predictor", "optimizer", "rng")
POSITION = ("step", "guard", "windows", "monitor", "bad")
"""Fields of a checkpoint's manifest that define a run's position."""


@dataclass(frozen=True)
class Row:
    """One part of the final state of two runs."""

    name: str
    compared: str
    problem: str = ""

    @property
    def same(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        return f"{self.name:13} {self.compared:32} {self.problem or 'identical'}"


def compare_resumed(config: Config, steps: int) -> list[Row]:
    """Train `steps` steps in one process and in two, and compare the final states bit by bit.

    The data is the config's. `InputError` for a config with several devices.
    """
    if config.runtime.devices > 1:
        raise InputError("verify-resume runs on one device: leave out runtime.devices")
    config = config.with_(
        optim={"minutes": "none"},
        log={"every_steps": 1, "to": ()},
        probe={"every_epochs": 0},
        checkpoint={"every_steps": 0, "every_epochs": 10**6},
    )
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        _in_a_process(config, whole, steps, resume=False)
        _in_a_process(config, cut, steps // 2, resume=False)
        state = open_checkpoint(cut).state
        if state["step"] == state["steps"]:
            raise InputError(
                f"the run has only {state['steps']} steps, so nothing would be left to resume: "
                "lower steps, or raise optim.epochs"
            )
        _in_a_process(config, cut, steps, resume=True)
        return [*_tensors(whole, cut), _position(whole, cut), _metrics(whole, cut)]


def _in_a_process(config: Config, out: Path, stop_after: int, *, resume: bool) -> None:
    spawn = multiprocessing.get_context("spawn")  # inherits nothing from this process
    receive, send = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_train, args=(config, out, stop_after, resume, send))
    process.start()
    send.close()
    try:
        kind, message = receive.recv()
    except EOFError:
        kind, message = "", ""
    process.join()
    if kind == "input":
        raise InputError(message)
    if kind != "done":
        raise RunError(message or f"the training process ended with code {process.exitcode}")


def _train(config: Config, out: Path, stop_after: int, resume: bool, send: Any) -> None:
    quiet = Console(file=io.StringIO())
    outcome = ("done", "")
    try:
        with suppress(Stopped):
            pretrain(config, out, resume=resume, console=quiet, stop_after=stop_after)
    except InputError as error:
        outcome = ("input", str(error))
    except (RunError, OSError) as error:
        outcome = ("run", str(error))
    send.send(outcome)


def _tensors(one: Path, other: Path) -> list[Row]:
    rows = []
    for name in FILES:
        first, second = (open_checkpoint(out).tensors(name) for out in (one, other))
        differ = sorted(first.keys() ^ second.keys())
        for key in first.keys() & second.keys():
            if not torch.equal(first[key], second[key]):
                differ.append(f"{key} by {_furthest(first[key], second[key]):.3g}")
        values = sum(value.numel() for value in first.values())
        shown = f"{len(differ)} differ: {', '.join(differ[:3])}" if differ else ""
        rows.append(Row(name, f"{len(first)} tensors, {values} values", shown))
    return rows


def _furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).abs().max())


def _position(one: Path, other: Path) -> Row:
    first, second = (open_checkpoint(out).state for out in (one, other))
    differ = [key for key in POSITION if first[key] != second[key]]
    return Row("position", ", ".join(POSITION), f"differs: {', '.join(differ)}" if differ else "")


def _metrics(one: Path, other: Path) -> Row:
    first, second = (_lines(out) for out in (one, other))
    differ = "" if len(first) == len(second) else f"{len(first)} and {len(second)} lines"
    for line, same in zip(first, second, strict=False):
        keys = [key for key in line.keys() | same.keys() if line.get(key) != same.get(key)]
        if keys and not differ:
            differ = f"step {line['step']} differs in {', '.join(sorted(keys))}"
    return Row("metrics.jsonl", f"{len(first)} lines except times", differ)


def _lines(out: Path) -> list[dict[str, Any]]:
    lines, _ = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCK_KEYS} for line in lines]
