"""Patch features of the same images at several checkpoints, side by side.

Suffixes: B images, N patches, D width, T patches of all images, K clusters or components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dseqjepa.model.vit import Images, VisionTransformer
from dseqjepa.viz.canvas import TILE_PIXELS
from dseqjepa.viz.tiles import photo_of

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Moment:
    """One checkpoint's view of the images: a column of a picture."""

    run: str
    """Which run, for the heading above its columns."""
    name: str
    """Which checkpoint, for the heading of the column: `step 400`."""
    features_BND: Float[np.ndarray, "B N D"]
    """Patch features of the target encoder after the final norm."""

    @property
    def features_TD(self) -> Float[np.ndarray, "T D"]:
        return self.features_BND.reshape(-1, self.features_BND.shape[-1])


@torch.no_grad()
def moment(
    encoder: VisionTransformer, images_BCHW: Images, run: str, name: str, batch: int = 64
) -> Moment:
    """A checkpoint's column, from its encoder."""
    device = encoder.pos_embed.device
    parts = [encoder(part.to(device)).patches_BND.cpu() for part in images_BCHW.split(batch)]
    return Moment(run, name, torch.cat(parts).float().numpy())


def spans(moments: Sequence[Moment]) -> list[tuple[str, int, int]]:
    """Column headings: each run above its checkpoints, after the column of images."""
    runs = [item.run for item in moments]
    return [(run, 1 + runs.index(run), runs.count(run)) for run in dict.fromkeys(runs)]


def anchor_of(moments: Sequence[Moment]) -> int:
    """The last checkpoint of the first run, to whose colours the others are matched."""
    return [item.run for item in moments].count(moments[0].run) - 1


def matched_in_chain(values: Sequence[T], anchor: int, match: Callable[[T, T], T]) -> list[T]:
    """The moments' values, each matched to its neighbour on the anchor's side.

    `match(reference, value)` aligns a value's arbitrary numbering or signs with the reference.
    Moments after the anchor, from another run, are matched to the anchor itself.
    """
    result = list(values)
    for index in range(anchor - 1, -1, -1):
        result[index] = match(result[index + 1], result[index])
    for index in range(anchor + 1, len(result)):
        result[index] = match(result[anchor], result[index])
    return result


def rows_of_tiles(
    images_BCHW: Tensor,
    values: Sequence[NDArray],
    draw: Callable[[Image.Image, NDArray], Image.Image],
) -> list[list[Image.Image]]:
    """For each image: the image, then `draw(photo, value)` for its value at each moment."""
    photos = [photo_of(image_CHW, TILE_PIXELS) for image_CHW in images_BCHW]
    return [
        [photo, *(draw(photo, value_B[number]) for value_B in values)]
        for number, photo in enumerate(photos)
    ]
