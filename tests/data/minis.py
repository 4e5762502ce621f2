"""What the tests of formats share: how the miniatures are written, and the truth about them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from dseqjepa.data.labelled import open_source
from dseqjepa.data.miniatures.export import WRITERS, export
from dseqjepa.data.miniatures.part import Part
from dseqjepa.data.scenes import Scene
from dseqjepa.data.source import Source, Split
from dseqjepa.errors import InputError

COUNTS = {"train": 30, "val": 13}
SEED = 3


def write(name: str, folder: Path) -> None:
    export(name, folder, count=COUNTS["train"], val_count=COUNTS["val"], seed=SEED)


@cache
def part(name: str, split: str) -> Part:
    """The scenes that a miniature was written of."""
    writer = WRITERS[name]
    return Part(  # type: ignore[arg-type]
        split, COUNTS[split], writer.side or 64, SEED, cycle=writer.cycle, least=writer.least
    )


@cache
def scenes(name: str, split: str) -> list[Scene]:
    return list(part(name, split).scenes())


def opened(name: str, folder: Path, split: Split) -> Source:
    return open_source(f"{name}:{folder}", split=split, size=1, image_size=(32, 32), seed=0)


def assert_image(source: Source, index: int, image_HW3: np.ndarray, slack: float = 0) -> None:
    """An image of a source is that of a scene; `slack`: mean difference that JPEG may make."""
    image_CHW = source.image(index)
    assert image_CHW.dtype == torch.uint8
    assert image_CHW.shape == (3, *image_HW3.shape[:2])
    difference = image_CHW.permute(1, 2, 0).numpy().astype(int) - image_HW3
    assert np.abs(difference).mean() <= slack


def refused(name: str, folder: Path, split: Split, message: str) -> None:
    """It does not open, and the one line says why and where to get the data."""
    with pytest.raises(InputError, match=message) as raised:
        opened(name, folder, split)
    text = str(raised.value)
    assert "has it" in text or "have copies" in text
    assert "\n" not in text


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that is there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
