"""Evaluations: closed output, changing data, a concurrent evaluation, a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dseqjepa.errors import InputError
from dseqjepa.tasks import knn, training
from tests.children import ends, start
from tests.faults.campaign import Attempts, fault
from tests.faults.checkpoints import wait_until
from tests.faults.commands import command, pictures
from tests.tasks.test_training import trained


def typed_of(folder: Path, out: Path) -> list[str]:
    settings = ["baselines=false", "cache=none", f"out={out}"]
    return ["evaluate", "knn", "random:dseq_vitt_demo", f"data={folder}", *settings]


@fault(31, "An evaluation whose output is closed, or on a full disk", quick=1, full=4)
def nobody_listens(attempts: Attempts) -> None:
    for name in ("a", "b"):
        pictures(attempts.folder / "pictures" / name)
    for number in range(attempts.count):
        what = ("closed", "full")[number % 2]
        with attempts.attempt(what):
            reader, closed = os.pipe()
            os.close(reader)
            target = os.open("/dev/full", os.O_WRONLY) if what == "full" else closed
            out = attempts.folder / f"{number}.json"
            typed = typed_of(attempts.folder / "pictures", out)
            said = subprocess.run(
                [sys.executable, "-m", "dseqjepa", *typed], stdout=target, stderr=subprocess.PIPE
            )
            for opened in {target, closed}:
                os.close(opened)
            assert said.returncode == 0, said
            assert "accuracy" in json.loads(out.read_text())["metrics"]


@fault(31, "Pictures removed during an evaluation: noted in the result", quick=1, full=3)
def changed_meanwhile(attempts: Attempts) -> None:
    measure = knn.evaluate
    for number in range(attempts.count):
        folder = attempts.place(number)
        for name in ("a", "b"):
            pictures(folder / "pictures" / name)
        gone = next((folder / "pictures/a").iterdir())

        def and_removed(*arguments: Any, gone: Path = gone) -> Any:
            found = measure(*arguments)
            gone.unlink()
            return found

        with attempts.attempt(f"without {gone.name}"):
            out = folder / "found.json"
            with mock.patch.object(knn, "evaluate", and_removed):
                assert command(*typed_of(folder / "pictures", out)).code == 0
            warnings = json.loads(out.read_text())["warnings"]
            assert warnings
            assert "changed during the evaluation" in warnings[0]


def train_and_stay(folder: Path) -> None:
    """In a child: it never comes back from its first save."""
    save = training.save_checkpoint

    def and_stay(*arguments: Any) -> None:
        save(*arguments)
        time.sleep(600)

    training.save_checkpoint = and_stay  # type: ignore[assignment]
    trained(folder, resume=True)


@fault(
    31, "Two evaluations in one folder: one is refused; a dead one does not block", quick=1, full=6
)
def two_evaluations(attempts: Attempts) -> None:
    whole = trained(attempts.folder / "whole")
    for number in range(attempts.count):
        place = attempts.place(number)
        folder, log = place / "training", place / "log"
        with attempts.attempt(f"pair {number}"):
            first = start(train_and_stay, folder, log=log)
            wait_until((folder / "checkpoints/last").exists)
            for way in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(InputError, match=f"in use by process {first.pid} on "):
                    trained(folder, **way)
            first.kill()
            assert ends([first], 240) == [-9]
            found = trained(folder, resume=True)
            assert all(torch.equal(found[key], value) for key, value in whole.items())
