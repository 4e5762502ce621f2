"""Images with saliency and numbered regions, for one or several methods: the paper's Fig. 4.

Suffixes: B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import UInt8
from torch import Tensor

from dseqjepa.viz.canvas import TILE_PIXELS, Figure, tile_table, write_numbers
from dseqjepa.viz.tiles import class_tile, heat_tile, photo_of
from dseqjepa.viz.trace import Trace


def regions_sheet(
    images_BCHW: UInt8[Tensor, "B 3 _ _"], traces: Mapping[str, Sequence[Trace]]
) -> Figure:
    """One row per image: the image, then each method's saliency and regions.

    Args:
        traces: method's label -> its trace of every image.
    """
    rows = []
    for number, image_CHW in enumerate(images_BCHW):
        photo = photo_of(image_CHW, TILE_PIXELS)
        row = [photo]
        for items in traces.values():
            row.append(heat_tile(photo, items[number].saliency_hw))
            row.append(class_tile(photo, items[number].rank_hw))
        rows.append(row)
    labels = list(traces)
    some = traces[labels[0]]
    table = tile_table(
        rows,
        ["image", *["saliency", "regions"] * len(labels)],
        some[0].rank_hw.shape,
        title="Saliency and ordered regions",
        caption=(
            "Saliency, scaled per image (dark: low, light: high), and regions: 1 is the most "
            "salient; of components, the last is the left-over region. Images with only the "
            "number 1 have a single region."
        ),
        groups=2 if len(rows) > 3 else 1,
        spans=[(label, 1 + 2 * index, 2) for index, label in enumerate(labels)],
    )
    size = max(7.0, 5.5 * table.tile + 2)
    for number, axes in enumerate(table.axes):
        for index, items in enumerate(traces.values()):
            item = items[number]
            write_numbers(axes[2 + 2 * index], item.rank_hw, size, item.count)
    return table.figure
