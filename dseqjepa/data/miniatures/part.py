"""The scenes of one split of a miniature.

Suffixes: B scenes that were chosen, P of a pool, C colours, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from dseqjepa.data.scenes import Scene, Scenes, render_scene, split_seed

SPARE = 500  # scenes of the pool beyond three times those wanted: every class has enough then


class Part:
    """`count` scenes of a split, after the first `skip`. The labels of `cycle` take turns, so that
    each occurs as often as any other; scenes with fewer than `least` objects are left out."""

    def __init__(
        self,
        split: Literal["train", "val"],
        count: int,
        size: int,
        seed: int,
        *,
        cycle: str = "class",
        least: int = 1,
        skip: int = 0,
    ) -> None:
        self.split, self.size = split, size
        self._seed, self._choice, self._end = seed, (cycle, least), skip + count
        pool = Scenes(3 * self._end + SPARE, size=32, seed=seed, split=split)
        index_P = np.flatnonzero(pool.labels["count"] + 1 >= least)
        label_P = pool.labels[cycle][index_P]
        # The first of each label, then the second of each, and so on.
        turn_P = np.zeros_like(label_P)
        for label in np.unique(label_P):
            turn_P[label_P == label] = np.arange(np.count_nonzero(label_P == label))
        self.index_B: Int64[np.ndarray, " B"] = index_P[np.lexsort((label_P, turn_P))]
        self.index_B = self.index_B[skip : self._end]
        self.labels = {task: label_P[self.index_B] for task, label_P in pool.labels.items()}

    def __len__(self) -> int:
        return len(self.index_B)

    def scenes(self) -> Iterator[Scene]:
        for index in self.index_B.tolist():
            yield render_scene(split_seed(self._seed, self.split), index, self.size)

    def labelled(self) -> Iterator[tuple[Scene, int]]:
        """The scenes, each with its class."""
        return zip(self.scenes(), self.labels["class"].tolist(), strict=True)

    def following(self) -> Part:
        """As many further scenes."""
        cycle, least = self._choice
        return Part(
            self.split,
            len(self),
            self.size,
            self._seed,
            cycle=cycle,
            least=least,
            skip=self._end,
        )


def save(path: Path, image_HWC: UInt8[np.ndarray, "H W *C"]) -> str:
    """Write an image (colours, or one number per pixel) in the format of the path's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lossy = path.suffix.lower() in (".jpg", ".jpeg")
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if lossy else {}
    Image.fromarray(image_HWC).save(path, **options)
    return path.name


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
