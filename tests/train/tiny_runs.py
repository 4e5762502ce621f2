"""Runs that take a moment: forty pictures in memory, and the smallest of models."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.data.source import BadImage, Source
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.log import CLOCK_KEYS
from dseqjepa.train.pretrain import pretrain
from tests.tiny import tiny_config

IMAGES, BATCH, EPOCHS = 40, 8, 4
PER_EPOCH = IMAGES // BATCH
STEPS = EPOCHS * PER_EPOCH
TENSOR_FILES = ("target", "context", "predictor", "optimizer", "rng")


class Pictures:
    """Smooth random images in memory; the ones in `bad` cannot be decoded."""

    def __init__(self, count: int = IMAGES, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad
        self.labels: Mapping[str, np.ndarray] = {}
        self.classes: Mapping[str, tuple[str, ...]] = {}
        generator = torch.Generator().manual_seed(3)
        coarse_NCHW = torch.rand(count, 3, 5, 5, generator=generator)
        self.images_NCHW = (F.interpolate(coarse_NCHW, 36) * 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def image(self, index: int) -> Tensor:
        if index in self.bad:
            raise BadImage("made so")
        return self.images_NCHW[index]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def fingerprint(self) -> str:
        return f"{len(self)} pictures"


def run_config(method: str = "dseq", *overrides: str) -> Config:
    """Four epochs of five steps. The method's own recipe, but C-JEPA's projector is narrow."""
    narrow = ["method.vicreg.projector_width=24"] if method == "cjepa" else []
    length = [f"data.batch_size={BATCH}", f"optim.epochs={EPOCHS}", "log.every_steps=3"]
    return tiny_config(f"{method}_vitt_demo", "data.source=memory", *length, *narrow, *overrides)


def quiet() -> Console:
    return Console(file=io.StringIO())


def train(config: Config, out: Path, source: Source | None = None, **settings: Any) -> Path:
    """Run to the end, or to the exception that ends it; `out` again."""
    pretrain(config, out, source=source or Pictures(), console=quiet(), **settings)
    return out


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run without those that tell the time."""
    return [{k: v for k, v in line.items() if k not in CLOCK_KEYS} for line in metrics(out)]


def tensors(out: Path, step: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a run's last checkpoint, or of that of a step, as `file/name`."""
    checkpoint = open_checkpoint(out, step)
    return {
        f"{name}/{key}": value
        for name in TENSOR_FILES
        for key, value in checkpoint.tensors(name).items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs ended in the same state, bit for bit, and said the same on the way."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    ends = [dict(open_checkpoint(out).state) for out in (one, other)]
    for state in ends:  # what may differ on resume, and the hashes that were compared above
        del state["config"], state["files"]
    assert ends[0] == ends[1]
    assert timeless(one) == timeless(other)
