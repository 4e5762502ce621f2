"""A task's job on tiny data, as `run_task` would make it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dseqjepa.data.source import Source
from dseqjepa.ranks import Ranks
from dseqjepa.tasks import training
from dseqjepa.tasks.run import Job
from tests.tasks.dense_data import tiny_backbone


def job_of(
    folder: Path,
    train: Source,
    test: Source,
    name: str = "result",
    ranks: Ranks | None = None,
    **settings: Any,
) -> Job:
    """A fresh backbone, the same every time."""
    return Job(
        backbone=tiny_backbone("model.depth=4"),
        train=train,
        test=test,
        folder=folder,
        device=torch.device("cpu"),
        ranks=ranks or Ranks(60),
        console=Console(file=io.StringIO()),
        name=name,
        **settings,
    )


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Have what trains a backbone stop there, as SIGTERM would."""
    real = training.fit

    def fit(*arguments: Any) -> Any:
        *others, place, start = arguments
        return real(*others, replace(place, stop_after=step), start)

    patch.setattr(training, "fit", fit)
