"""A task's job on tiny data, as `run_task` would make it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dseqjepa.data.source import Source
from dseqjepa.ranks import Ranks
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
