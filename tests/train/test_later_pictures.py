"""Continuing with new pictures keeps exactly the encoders of the old run, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dseqjepa.train.checkpoint import open_checkpoint
from tests.test_cli import pictures, run
from tests.tiny import TINY

TYPED = [
    "pretrain", "vitt8_64", "data=pictures", *TINY, "optim.epochs=3", "optim.warmup_epochs=1",
    "checkpoint.keep=9", "checkpoint.every_epochs=1", "log.every_steps=1",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three epochs of three steps, and eight pictures that came after."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 24)
    assert run(monkeypatch, *TYPED, "out=run") == 0
    generator = np.random.default_rng(1)
    for index in range(8):
        pixels = generator.integers(0, 256, (36, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/a/later-{index}.png")
    return tmp_path


def steps(out: str) -> list[dict[str, float]]:
    lines = Path(out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_a_new_run_has_the_weights_and_a_schedule_of_its_own(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, *TYPED, "out=week2", "init_from=run") == 0
    first, last = here / "week2/checkpoints/step-00000000", open_checkpoint(here / "run").path
    for name in ("target", "context"):
        ours, theirs = (load_file(path / f"{name}.safetensors") for path in (first, last))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (load_file(path / "predictor.safetensors") for path in (first, last))
    assert not all(torch.equal(ours[key], theirs[key]) for key in ours)
    rates = [each["lr"] for each in steps("week2")]
    assert len(rates) == 3 * 4  # eight more pictures: another step an epoch
    assert rates[0] < max(rates) > rates[-1]
    state = open_checkpoint(here / "week2").state
    assert state["data_fingerprint"] != open_checkpoint(here / "run").state["data_fingerprint"]


def test_a_run_is_resumed_with_more_pictures_where_that_is_accepted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = [*TYPED, "out=run", "resume=6"]
    assert run(monkeypatch, *resumed) == 2
    assert "the list or sizes changed" in capsys.readouterr().err
    before = steps("run")
    kept = load_file(here / "run/checkpoints/step-00000006/target.safetensors")
    assert run(monkeypatch, *resumed, "allow_changed=data") == 0
    again = load_file(here / "run/checkpoints/step-00000006/target.safetensors")
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    after = steps("run")
    assert [each["step"] for each in after] == list(range(1, 13))
    assert [each["loss"] for each in after[:6]] == [each["loss"] for each in before[:6]]
    assert all(math.isfinite(each["loss"]) for each in after)
    assert "changed images: " in (here / "run/log.txt").read_text(encoding="utf-8")
    # The rest of a run that had ended: its rate goes back up, which the document says.
    assert after[6]["lr"] > before[6]["lr"]
