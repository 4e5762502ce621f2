"""Pictures whose colour says their label, and backbones that see all of it, something else, or
nothing: what a metric must come to is known on paper."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from dseqjepa.data.source import BadImage
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.backbone import Backbone, Encoded
from dseqjepa.tasks.run import Job

SIZE = (8, 8)
CLASSES = 5


class Cards:
    """Flat cards: red is the class, green the number of the card modulo 256, blue noise."""

    def __init__(
        self, count: int, seed: int = 0, bad: tuple[int, ...] = (), classes: int = CLASSES
    ) -> None:
        generator = np.random.default_rng(seed)
        label_N = generator.integers(0, classes, count)
        self.noise = generator.integers(0, 256, count)
        self.bad, self.seed, self.read = bad, seed, list[int]()
        tasks = ("class", "count", "distance")
        self.labels: Mapping[str, np.ndarray] = dict.fromkeys(tasks, label_N)
        names = tuple(f"class {label}" for label in range(classes))
        self.classes: Mapping[str, tuple[str, ...]] = dict.fromkeys(self.labels, names)

    def __len__(self) -> int:
        return len(self.noise)

    def image(self, index: int) -> Tensor:
        self.read.append(index)
        if index in self.bad:
            raise BadImage("made so")
        colour = [int(self.labels["class"][index]), index % 256, int(self.noise[index])]
        return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, *SIZE).contiguous()

    def name(self, index: int) -> str:
        return f"/cards/{index // 100}/{index}.png"

    def fingerprint(self) -> str:
        return f"{len(self)} cards {self.seed} {self.bad}"


class Seer(Backbone):
    """Its features are the class ("class"), noise that is the same for an image every time
    ("noise"), or always one ("nothing")."""

    def __init__(self, sees: str, has_cls: bool = False, width: int = 8) -> None:
        super().__init__(
            nn.Identity(),
            [],
            nn.Identity(),
            width=width,
            patch_size=8,
            image_size=SIZE,
            prefix=int(has_cls),
            has_cls=has_cls,
        )
        self.sees, self.depth = sees, 4
        self.name, self.weights, self.source = sees, "random", sees
        self.seen = 0

    def digest(self) -> str:
        return f"{self.sees} {self.width}"

    def forward(self, images_BCHW: Tensor, last: int = 4) -> Encoded:
        self.seen += len(images_BCHW)
        colour_BC = images_BCHW[:, :, 0, 0].long()
        if self.sees == "class":
            feature_BD = F.one_hot(colour_BC[:, 0], self.width).float()
        elif self.sees == "noise":
            code_BD = colour_BC[:, 1:2] * 256 + colour_BC[:, 2:] + 977 * torch.arange(self.width)
            feature_BD = (code_BD.double() * 12.9898).sin().mul(43758.5453).frac().abs().float()
        else:
            feature_BD = torch.ones(len(images_BCHW), self.width)
        patches_BND = feature_BD[:, None].expand(-1, 3, -1)
        heads = (feature_BD,) * last if self.has_cls else ()
        return Encoded(heads[-1] if heads else None, patches_BND, (patches_BND,) * last, heads)


def make_job(
    backbone: Backbone, train: Cards, test: Cards, folder: Path, ranks: Ranks | None = None
) -> Job:
    console = Console(file=io.StringIO())
    device = torch.device("cpu")
    return Job(backbone, train, test, folder, device, ranks or Ranks(60), console, "result")


def majority(train: Cards, test: Cards) -> float:
    """What one gets, in per cent, who always says the commonest class of the training images."""
    commonest = np.bincount(train.labels["class"]).argmax()
    return float(100 * (test.labels["class"] == commonest).mean())
