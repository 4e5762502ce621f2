"""`Trainer.take_step`: a training step without logging, saving or guards."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dseqjepa.train.checkpoint import Start, load_method
from dseqjepa.train.loop import Trainer
from tests.train.tiny_runs import STEPS, Pictures, run_config, train


def trainer_of(out: Path, *overrides: str) -> Trainer:
    config = run_config("dseq", *overrides)
    return Trainer(config, Pictures(), out, Start(), console=Console(file=io.StringIO()))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_steps_by_hand_are_those_of_a_run(accumulate: int, tmp_path: Path) -> None:
    settings = f"optim.accumulate={accumulate}"
    whole = load_method(train(run_config("dseq", settings), tmp_path / "run"))
    trainer = trainer_of(tmp_path / "none", settings)
    while trainer.step < trainer.schedule.steps:
        batches = trainer.loader.batches(trainer.step // trainer.schedule.steps_per_epoch)
        for _ in range(trainer.schedule.steps_per_epoch):
            trainer.take_step(batches)
    assert trainer.step == STEPS
    for name, value in whole.state_dict().items():
        assert torch.equal(trainer.method.state_dict()[name], value), name
    assert not (tmp_path / "none").exists()


def test_a_step_that_is_not_accepted_changes_no_weight(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "none")
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    batches, seen = trainer.loader.batches(0), []

    def refuse(loss: float, norm: float) -> bool:
        seen.append((loss, norm))
        return False

    taken = trainer.take_step(batches, refuse)
    assert seen == [(taken.loss, taken.norm)]
    assert math.isclose(taken.loss, float(taken.parts[0].loss), rel_tol=1e-6)
    assert trainer.step == 1
    for name, value in trainer.method.state_dict().items():
        assert torch.equal(before[name], value), name
    assert not trainer.optimizer.state
    trainer.take_step(batches)
    changed = [n for n, v in trainer.method.state_dict().items() if not torch.equal(before[n], v)]
    assert any(name.startswith("encoder.") for name in changed)
    assert any(name.startswith("target.") for name in changed)
