"""Ground truth and prediction: pixel classes, and objects with their boxes and masks.

Classes get the palette's colours in order of their area in the ground truth; if there are more
classes than colours, the rest is grey.

Suffixes: C colours, H and W pixels, K objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dseqjepa.data.source import Instances
from dseqjepa.viz.canvas import (
    GAP,
    SMALL,
    TILE_PIXELS,
    Axes,
    Figure,
    Rectangle,
    Table,
    colour,
    inches_of,
    note,
    shortened,
    text_width,
    tile_table,
)
from dseqjepa.viz.style import INK, PALETTE, VEIL
from dseqjepa.viz.tiles import class_tile, colour_tile, heat_of, photo_of

GROUPS = 2
"""Images side by side."""
HEADINGS = ("image", "ground truth", "prediction")
SURE = 0.5
"""Minimum score of a drawn object."""
MOST = 20
"""Maximum number of objects drawn per image."""
OTHER = np.array([(125, 125, 125)])


class Segmented(NamedTuple):
    """An image with a class for every pixel, 1 to the number of categories; 0 is ignored."""

    name: str
    image_CHW: Tensor
    truth_HW: Tensor
    predicted_HW: Tensor


class Found(NamedTuple):
    """An image with its objects, and the detections, best first."""

    name: str
    image_CHW: Tensor
    truth: Instances
    predicted: Instances
    score_K: Tensor


def segmentation_sheet(
    examples: Sequence[tuple[str, Tensor, Tensor, Tensor]], categories: Sequence[str]
) -> Figure:
    """Image, and true and predicted class of every pixel; two images per row.

    Args:
        examples: the fields of `Segmented`.
        categories: the names of classes 1, 2, ...
    """
    shown = [Segmented(*example) for example in examples]
    pixels = [np.bincount(item.truth_HW.flatten().numpy(), minlength=1) for item in shown]
    place = _places(pixels, len(categories))
    rows = []
    for item in shown:
        photo = photo_of(item.image_CHW, TILE_PIXELS)
        tiles = [photo, *_class_tiles(photo, item.truth_HW, item.predicted_HW, place)]
        rows.append([_square(tile) for tile in tiles])
    table = _table(
        rows,
        "Segmentation: ground truth and prediction",
        "The class of every pixel over the grey image, white lines between classes. Pale: not "
        "labelled, not scored.",
        place,
        categories,
    )
    return table.figure


def detection_sheet(
    examples: Sequence[tuple[str, Tensor, Instances, Instances, Tensor]],
    categories: Sequence[str],
) -> Figure:
    """Image, true objects, and detections with a score of at least `SURE`; two images per row.

    Args:
        examples: the fields of `Found`.
        categories: the names of labels 1, 2, ...
    """
    shown = [Found(*example) for example in examples]
    labels = [np.bincount(item.truth.label_K.numpy(), minlength=1) for item in shown]
    place = _places(labels, len(categories))
    photos = [_square(photo_of(item.image_CHW, TILE_PIXELS)) for item in shown]
    table = _table(
        [[photo] * 3 for photo in photos],
        "Detection: ground truth and detections",
        f"Masks and boxes in the colour of their class, dashed for crowds. Detections: at most "
        f"{MOST} per image, with a score of at least {SURE:g}, written below.",
        place,
        categories,
        under=0.04 + 2 * inches_of(SMALL),
    )
    for item, axes in zip(shown, table.axes, strict=True):
        best_K = (item.score_K >= SURE).nonzero()[:MOST, 0]
        _draw_objects(axes[1], item.truth, range(len(item.truth.label_K)), place)
        _draw_objects(axes[2], item.predicted, best_K.tolist(), place)
        names = [categories[label - 1] for label in item.truth.label_K.tolist()]
        said = [
            f"{categories[int(item.predicted.label_K[k]) - 1]} {item.score_K[k]:.2f}"
            for k in best_K.tolist()
        ]
        for place_axes, text in ((axes[1], names), (axes[2], said)):
            note(place_axes, _in_two_lines(text, table.tile))
    return table.figure


def _class_tiles(
    photo: Image.Image, truth_HW: Tensor, said_HW: Tensor, place: NDArray[np.int64]
) -> list[Image.Image]:
    """True and predicted classes; pixels ignored in the truth are not scored."""
    true_HW = place[truth_HW.numpy()]
    colours = np.concatenate([[VEIL], PALETTE, OTHER])
    shown_HW = np.where(true_HW == 0, 0, place[said_HW.numpy()])
    return [class_tile(photo, each, colours) for each in (true_HW, shown_HW)]


def _places(counts: Sequence[NDArray[np.integer]], classes: int) -> NDArray[np.int64]:
    """Each label's colour index: 0 for none, then 1, 2, ... by the area shown; labels without a
    colour of their own share the last."""
    total = np.zeros(classes + 1, np.int64)
    for count in counts:
        total[: len(count)] += count
    order = 1 + np.argsort(-total[1:], kind="stable")
    place = np.full(classes + 1, len(PALETTE) + 1)
    place[0] = 0
    place[order[: len(PALETTE)]] = 1 + np.arange(min(len(PALETTE), classes))
    return place


def _table(
    rows: Sequence[Sequence[Image.Image]],
    title: str,
    caption: str,
    place: NDArray[np.int64],
    categories: Sequence[str],
    under: float = 0.0,
) -> Table:
    table = tile_table(
        rows,
        HEADINGS,
        (1, 1),
        title=title,
        caption=caption,
        groups=GROUPS,
        under=under,
        room=0.2 + 2 * inches_of(SMALL),
    )
    _class_legend(table, place, categories, len(HEADINGS) * min(GROUPS, len(rows)))
    return table


def _class_legend(
    table: Table, place: NDArray[np.int64], categories: Sequence[str], across: int
) -> None:
    """The legend below a table with this many tiles per row."""
    coloured = [int(np.flatnonzero(place == n)[0]) for n in range(1, len(PALETTE) + 1)
                if (place == n).any()]  # fmt: skip
    names = [categories[label - 1] for label in coloured]
    colours = [*PALETTE[: len(coloured)]]
    if len(categories) > len(coloured):
        names.append("any other")
        colours.append(OTHER[0])
    marks = [Rectangle((0, 0), 1, 1, color=colour(rgb)) for rgb in colours]
    shown = [shortened(name, 1.6, SMALL) for name in names]
    width = max(across * table.tile + (across - 1) * GAP, 5.0)
    table.page.legend(0, table.below + 0.14, width, shown, marks)


def _draw_objects(
    axes: Axes, objects: Instances, chosen: Sequence[int], place: NDArray[np.int64]
) -> None:
    """Draw objects on axes in which the square tile is 1 x 1."""
    height, width = objects.masks_KHW.shape[1:]
    side = max(height, width)
    left, top = (side - width) / 2, (side - height) / 2
    colours = np.concatenate([PALETTE, OTHER])
    for k in chosen:
        rgb = colours[place[int(objects.label_K[k])] - 1]
        mask_HW = objects.masks_KHW[k].numpy()
        paint = np.zeros((height, width, 4))
        paint[mask_HW] = (*(rgb / 255), 0.55)
        extent = (left / side, (left + width) / side, (top + height) / side, top / side)
        axes.imshow(paint, extent=extent, aspect="auto", interpolation="nearest")
        x0, y0, x1, y1 = objects.boxes_K4[k].tolist()
        for line, thick in ((np.array(INK), 2.2), (rgb, 1.2)):  # visible on any picture
            axes.add_patch(
                Rectangle(
                    ((left + x0) / side, (top + y0) / side),
                    (x1 - x0) / side,
                    (y1 - y0) / side,
                    fill=False,
                    edgecolor=colour(line),
                    linewidth=thick,
                    linestyle="--" if objects.crowd_K[k] else "-",
                )
            )
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


def _in_two_lines(words: Sequence[str], width: float) -> str:
    """Words separated by commas, on at most two lines; words that do not fit are counted."""
    lines: list[str] = [""]
    for number, word in enumerate(words):
        longer = f"{lines[-1]}, {word}" if lines[-1] else word
        room = width if len(lines) == 1 else width - 0.4
        if text_width(longer, SMALL) <= room:
            lines[-1] = longer
        elif len(lines) == 1 and lines[0]:
            lines.append(word)
        else:
            lines[-1] += f" +{len(words) - number}"
            break
    return "\n".join(lines) if words else "nothing"


def _square(tile: Image.Image) -> Image.Image:
    """The tile centred on a pale square, so that all tiles of a sheet have equal size."""
    square = Image.new("RGB", (TILE_PIXELS, TILE_PIXELS), VEIL)
    square.paste(tile, ((TILE_PIXELS - tile.width) // 2, (TILE_PIXELS - tile.height) // 2))
    return square


def patches_sheet(
    by_kind: Mapping[str, Sequence[tuple[str, Tensor, Tensor, Tensor]]],
    categories: Sequence[str],
) -> Figure:
    """The class of every pixel, its depth, or both; one row per image.

    Args:
        by_kind: "segmentation" and "depth" -> name, image, truth and prediction of the same images.
            Infinite depth is not scored.
        categories: the names of classes 1, 2, ...
    """
    classes = by_kind.get("segmentation", ())
    depths = by_kind.get("depth", ())
    rows: list[list[Image.Image]] = []
    place = _places([np.bincount(t.flatten().numpy()) for _, _, t, _ in classes], len(categories))
    known = [truth_HW[truth_HW.isfinite()] for _, _, truth_HW, _ in depths]
    farthest = max((float(each.max()) for each in known if len(each)), default=1.0)
    for number in range(max(len(classes), len(depths))):
        _, image_CHW, *_ = (classes or depths)[number]
        photo = photo_of(image_CHW, TILE_PIXELS)
        row = [photo]
        if classes:
            row += _class_tiles(photo, *classes[number][2:], place)
        if depths:
            _, _, truth_HW, said_HW = depths[number]
            unknown_HW = ~truth_HW.isfinite().numpy()
            row += [
                _depth_tile(photo, each.numpy(), unknown_HW, farthest)
                for each in (truth_HW, said_HW)
            ]
        rows.append([_square(tile) for tile in row])
    headings = ["image"]
    headings += ["class\nground truth", "class\nlinear"] if classes else []
    headings += ["depth\nground truth", "depth\nlinear"] if depths else []
    table = tile_table(
        rows,
        headings,
        (1, 1),
        title="Class and depth predicted from frozen patches",
        caption="Pale: not labelled, or not scored."
        + (f" Depth from near (dark) to {farthest:.1f} (light)." if depths else ""),
        room=0.2 + 2 * inches_of(SMALL) if classes else 0.0,
    )
    if classes:
        _class_legend(table, place, categories, len(headings))
    return table.figure


def _depth_tile(
    photo: Image.Image, depth_HW: NDArray[np.floating], unknown_HW: NDArray[np.bool_], most: float
) -> Image.Image:
    colour_HW3 = heat_of(depth_HW, (0.0, most))
    colour_HW3[unknown_HW] = VEIL
    return colour_tile(photo, colour_HW3)
