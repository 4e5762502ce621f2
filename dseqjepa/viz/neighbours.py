"""Nearest neighbours of images in an encoder's feature space.

Suffixes: B query images, M images of the data, K neighbours, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from dseqjepa.viz.canvas import SMALL, TILE_PIXELS, Figure, inches_of, note, shortened, tile_table
from dseqjepa.viz.tiles import photo_of


@dataclass(frozen=True, eq=False)
class Nearest:
    """The K nearest neighbours of each image, nearest first."""

    index_BK: Int64[Tensor, "B K"]
    cosine_BK: Float[Tensor, "B K"]


def nearest(
    query_BD: Float[Tensor, "B D"], feature_MD: Float[Tensor, "M D"], count: int
) -> Nearest:
    """Nearest by cosine similarity; ties go to the first; all images if fewer than `count`."""
    cosine_BM = F.normalize(query_BD.double(), dim=1) @ F.normalize(feature_MD.double(), dim=1).T
    order_BM = cosine_BM.argsort(dim=1, descending=True, stable=True)
    index_BK = order_BM[:, :count]
    return Nearest(index_BK, cosine_BM.gather(1, index_BK).float())


def neighbour_sheet(
    images_BCHW: UInt8[Tensor, "B 3 _ _"],
    found: Mapping[str, Nearest],
    thumbnails: Mapping[int, UInt8[Tensor, "3 _ _"]],
    notes: Mapping[int, str],
) -> Figure:
    """One row per image: the image, then its neighbours by each encoder.

    Args:
        found: encoder's label -> its neighbours of every image.
        thumbnails: index into the data -> that image, at the size of `images_BCHW`.
        notes: index into the data -> a note below it, such as its class.
    """
    rows: list[list[Image.Image]] = []
    texts: list[list[str]] = []
    for number, image_CHW in enumerate(images_BCHW):
        row, text = [photo_of(image_CHW, TILE_PIXELS)], [""]
        for item in found.values():
            pairs = zip(
                item.index_BK[number].tolist(), item.cosine_BK[number].tolist(), strict=True
            )
            for index, cosine in pairs:
                row.append(photo_of(thumbnails[index], TILE_PIXELS))
                text.append(f"{cosine:.3f}\n{notes.get(index, '')}")
        rows.append(row)
        texts.append(text)
    count = next(iter(found.values())).index_BK.shape[1]
    places = [str(place + 1) for place in range(count)]
    table = tile_table(
        rows,
        ["image", *places * len(found)],
        (1, 1),
        title="Nearest neighbours",
        caption=(
            "The nearest images in the data by the cosine between mean patch features, which is "
            "written below each with its class, if any. An image that is in the data is its own "
            "nearest neighbour, with cosine 1."
        ),
        spans=[(label, 1 + count * index, count) for index, label in enumerate(found)],
        under=0.04 + 2 * inches_of(SMALL),
    )
    for line, text in zip(table.axes, texts, strict=True):
        for axes, words in zip(line, text, strict=True):
            cosine, _, name = words.partition("\n")
            note(axes, f"{cosine}\n{shortened(name, table.tile, SMALL)}")
    return table.figure
