"""`verify-resume` reports exactness, or what differs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dseqjepa.config import Config
from dseqjepa.errors import InputError, RunError
from dseqjepa.train import verify
from dseqjepa.train.verify import compare_resumed
from tests.train.tiny_runs import run_config

SCENES = ("data.source=scenes", "data.size=24", "data.batch_size=8")


class Pipe:
    def send(self, message: tuple[str, str]) -> None:
        assert message == ("done", "")


def change_when_resumed(monkeypatch: pytest.MonkeyPatch, **change: Any) -> None:
    """The training processes become calls; the resumed one has another config."""

    def train(config: Config, out: Path, stop_after: int, *, resume: bool) -> None:
        config = config.with_(**change) if resume else config
        verify._train(config, out, stop_after, resume, Pipe())

    monkeypatch.setattr(verify, "_in_a_process", train)
    monkeypatch.setattr("dseqjepa.train.pretrain.FREE_ON_RESUME", ("",))


def test_the_same_config_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    change_when_resumed(monkeypatch)
    rows = compare_resumed(run_config("dseq", *SCENES), 5)
    assert all(row.same for row in rows)
    assert [row.name for row in rows][-2:] == ["position", "metrics.jsonl"]
    assert rows[-1].compared == "5 lines except times"


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    change_when_resumed(monkeypatch, optim={"weight_decay": 0.5})
    rows = {row.name: row for row in compare_resumed(run_config("dseq", *SCENES), 5)}
    assert not rows["context"].same
    assert " differ: " in rows["context"].problem
    assert " by " in rows["context"].problem
    assert rows["rng"].same
    assert rows["metrics.jsonl"].problem.startswith("step 3 differs in wd")


def test_wrong_input_and_a_run_that_fails_are_passed_on(tmp_path: Path) -> None:
    """In processes of its own, as a user has it."""
    with pytest.raises(InputError, match="no such folder"):
        compare_resumed(run_config("dseq", f"data.source={tmp_path}/gone"), 4)
    with pytest.raises(InputError, match="one device"):
        compare_resumed(run_config("dseq", "runtime.devices=2"), 4)
    with pytest.raises(InputError, match="has only 3 steps, so nothing would be left to resume"):
        compare_resumed(run_config("dseq", *SCENES, "optim.epochs=1", "optim.warmup_epochs=0"), 6)


def test_a_training_process_that_dies_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_train", _die)
    with pytest.raises(RunError, match="ended with code 7"):
        compare_resumed(run_config("dseq", *SCENES), 4)


def _die(*_: Any) -> None:
    os._exit(7)
