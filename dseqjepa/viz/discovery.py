"""Object discovery: the objects, the maps, and the regions cut from them.

Suffixes: C colours, H and W pixels, P patches of a grid (row-major).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from dseqjepa.config import CutConfig
from dseqjepa.viz.canvas import TILE_PIXELS, Figure, tile_table, write_numbers
from dseqjepa.viz.tiles import class_tile, heat_tile, photo_of, value_tile

NUMBER_POINTS = 7.5
HEADINGS = {
    "cls_similarity": "[CLS]\nsimilarity",
    "cls_attention": "[CLS]\nattention",
    "grad_cam": "Grad-CAM",
}


class Discovered(NamedTuple):
    """An image, the share of each patch covered by objects, maps by name, and ranks by kind of
    region."""

    name: str
    image_CHW: Tensor
    cover_P: Tensor
    maps: Mapping[str, Tensor]
    ranks: Mapping[str, Tensor]


def discovery_sheet(
    examples: Sequence[tuple[str, Tensor, Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]],
    grid: tuple[int, int],
    cut: CutConfig,
) -> Figure:
    """One row per image: objects, each of the encoder's maps, and the regions of its own map.

    Args:
        examples: the fields of `Discovered`.
        grid: rows and columns of patches.
        cut: how the regions were cut.
    """
    shown = [Discovered(*example) for example in examples]
    maps, kinds = list(shown[0].maps), list(shown[0].ranks)
    own = HEADINGS.get(cut.saliency.kind, cut.saliency.kind).replace("\n", " ")
    table = tile_table(
        [_tiles(item, grid) for item in shown],
        ["image", "objects", *(HEADINGS.get(name, name) for name in maps), *kinds],
        grid,
        title="Discovery: objects, maps and regions",
        caption="Objects: the share of each patch that they cover. Maps: each scaled to its own "
        "range, hot is high; pixels is the rarity of raw pixels. Regions of "
        f"{own}, 1 the most salient, at most {cut.regions.count}, each of at least "
        f"{cut.regions.min_area:g} of the grid (except the left-over of components).",
        spans=[
            ("maps", 2, len(maps)),
            (f"regions of {own}", 2 + len(maps), len(kinds)),
        ],
    )
    for item, axes in zip(shown, table.axes, strict=True):
        for place, rank_P in zip(axes[-len(kinds) :], item.ranks.values(), strict=True):
            write_numbers(place, rank_P.numpy().reshape(grid), NUMBER_POINTS)
    return table.figure


def _tiles(item: Discovered, grid: tuple[int, int]) -> list[Image.Image]:
    photo = photo_of(item.image_CHW, TILE_PIXELS)
    return [
        photo,
        value_tile(photo, item.cover_P.double().numpy().reshape(grid), (0, 1)),
        *(heat_tile(photo, map_P.double().numpy().reshape(grid)) for map_P in item.maps.values()),
        *(class_tile(photo, rank_P.numpy().reshape(grid)) for rank_P in item.ranks.values()),
    ]
