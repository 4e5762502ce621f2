"""Checks that an export computes the encoder's features, on the same images in its own process.

Suffixes: B images, H and W pixels, C colours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dseqjepa.data.loader import read
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError, RunError
from dseqjepa.export import reader
from dseqjepa.export.formats import FORMATS
from dseqjepa.model.dialects import farthest
from dseqjepa.model.vit import VisionTransformer

IMAGES = 4
"""Number of images compared."""


class Difference(NamedTuple):
    """The largest difference of a feature, relative to its root mean square if that is above 1."""

    feature: str
    image_size: tuple[int, int]
    value: float
    bound: float | None
    """None where the other library is known to interpolate differently."""

    def __str__(self) -> str:
        height, width = self.image_size
        what = "[CLS]" if self.feature == "cls" else self.feature
        allowed = "positions are interpolated differently"
        if self.bound is not None:
            allowed = f"allowed: {self.bound:g}"
        return f"{what} at {height} x {width} px: {self.value:.1e} ({allowed})"


def compare(
    encoder: VisionTransformer, form: str, folder: Path, source: Source
) -> list[Difference]:
    """The differences between an encoder and its export, on `IMAGES` images of a source.

    Raises:
        InputError: none of the images can be decoded.
        RunError: the other library cannot load the export, or a difference exceeds the format's
            bound.
    """
    rows, columns = encoder.grid
    own, other = (
        (encoder.patch_size * r, encoder.patch_size * c)
        for r, c in ((rows, columns), (rows + rows // 2 + 1, columns + columns // 2 + 1))
    )
    bound, any_size = FORMATS[form].bound, FORMATS[form].any_size
    sizes = (own, other) if any_size or rows == columns else (own,)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place)
        for number, size in enumerate(sizes):
            _write_images(encoder, source, size, data, number)
        _run_reader(form, folder, data)
        found = [
            difference
            for number, size in enumerate(sizes)
            for difference in _differences(
                encoder, data, number, size, bound if size == own or any_size else None
            )
        ]
    for difference in found:
        if difference.bound is not None and not difference.value <= difference.bound:
            raise RunError(
                f"export discarded: in {FORMATS[form].library} its features differ from the "
                f"encoder's: {difference}"
            )
    return found


def _write_images(
    encoder: VisionTransformer, source: Source, size: tuple[int, int], data: Path, number: int
) -> None:
    few = min(IMAGES, len(source))
    index_B = torch.arange(few) * len(source) // few
    done = read(source, index_B, EvalTransform(size), index_B)
    if not len(done.images_BCHW):
        raise InputError(
            f"none of the {few} images to compare on can be decoded: choose others with data=PATH"
        )
    np.save(data / f"images-{number}.npy", done.images_BCHW.numpy())
    np.save(data / f"pixels-{number}.npy", encoder.normalized(done.images_BCHW).numpy())


def _run_reader(form: str, folder: Path, data: Path) -> None:
    """Isolated (-I): Python searches neither the working folder nor PYTHONPATH."""
    command = [sys.executable, "-I", reader.__file__, form, str(folder.resolve()), str(data)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, cwd=data, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise RunError(f"export discarded: {FORMATS[form].library} cannot load it ({reason})")


def _differences(
    encoder: VisionTransformer,
    data: Path,
    number: int,
    size: tuple[int, int],
    bound: float | None,
) -> Iterator[Difference]:
    with torch.inference_mode():
        features = encoder(
            torch.from_numpy(np.load(data / f"images-{number}.npy", allow_pickle=False))
        )
    wanted = {"cls": features.cls_BD, "patches": features.patches_BND}
    for name, ours in wanted.items():
        if ours is not None:
            theirs = torch.from_numpy(np.load(data / f"{name}-{number}.npy", allow_pickle=False))
            yield Difference(name, size, farthest(ours, theirs), bound)
