"""A custom loop over `Trainer.steps` trains as `run` does, on any torch Dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import dseqjepa as dj
from tests.train.tiny_runs import STEPS, Pictures, quiet, run_config, train


class Items(Dataset):  # type: ignore[type-arg]
    """The pictures of the tiny runs, with something beside each."""

    def __init__(self) -> None:
        self.pictures = Pictures()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.pictures.image(index), {"a": index}


def test_its_steps_are_those_of_a_run(tmp_path: Path) -> None:
    config = run_config()
    wanted = dj.load_encoder(train(config, tmp_path / "run")).state_dict()
    source = dj.DatasetSource(Items())
    trainer = dj.Trainer(config.resolved(len(source)), source, tmp_path / "own", console=quiet())
    losses = []
    for taken in trainer.steps():
        losses.append(taken.loss)
        assert trainer.step == len(losses)
        if trainer.step == 7:
            assert not (tmp_path / "own").exists()
            trainer.save()
    assert len(losses) == STEPS
    found = trainer.method.target.state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert dj.load_encoder(tmp_path / "own") is not None


def test_a_loop_can_be_left_and_gone_on_with(tmp_path: Path) -> None:
    trainer = dj.Trainer(run_config(), Pictures(), tmp_path / "own", console=quiet())
    for _ in trainer.steps():
        if trainer.step == 7:
            break
    assert sum(1 for _ in trainer.steps()) == STEPS - 7


def test_too_many_bad_images_end_it(tmp_path: Path) -> None:
    config = run_config("dseq", "data.max_bad=0.01")
    trainer = dj.Trainer(config, Pictures(bad=(3, 4)), tmp_path / "own", console=quiet())
    with pytest.raises(dj.RunError, match=r"2 of 40 images cannot be decoded|1 of 40"):
        list(trainer.steps())
