"""Tiles: images overlaid with information about their patches.

Suffixes: h and w rows and columns of patches, H and W pixels, 3 colours (last in memory here, as
Pillow has them), R patches of one region, X axes (row, column).
"""

from __future__ import annotations

import base64
import io

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dseqjepa.viz.style import BORDER, HEAT, INK, PALETTE, PAPER, VEIL

HEAT_OPACITY, REGION_OPACITY, VEIL_OPACITY = 0.7, 0.5, 0.82  # over the grey picture

Pixels = UInt8[np.ndarray, "H W 3"]


def photo_of(image_CHW: UInt8[Tensor, "3 _ _"], longer_side: int) -> Image.Image:
    """An image resized so that its longer side has this many pixels."""
    photo = Image.fromarray(image_CHW.cpu().permute(1, 2, 0).numpy())
    width, height = (round(longer_side * side / max(photo.size)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.LANCZOS)


def data_uri(image_CHW: UInt8[Tensor, "3 _ _"]) -> str:
    """A picture as a data URI, for self-contained pages."""
    file = io.BytesIO()
    Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(file, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def heat_tile(photo: Image.Image, saliency_hw: NDArray[np.floating]) -> Image.Image:
    """Saliency as heat over the grey picture; a flat map is cold everywhere."""
    low, high = float(saliency_hw.min()), float(saliency_hw.max())
    return value_tile(photo, saliency_hw, (low, high))


def value_tile(
    photo: Image.Image, value_hw: NDArray[np.floating], limits: tuple[float, float]
) -> Image.Image:
    """Values as heat over the grey picture, cold at the lower limit and hot at the upper one."""
    colour_HW3 = enlarge(heat_of(value_hw, limits), photo)
    return Image.fromarray(_over_grey(photo, colour_HW3, HEAT_OPACITY))


def heat_of(values: NDArray[np.floating], limits: tuple[float, float]) -> NDArray[np.float64]:
    """The colour of each value, clipped to the limits: 0 to 255, in a new last axis.

    If the limits are equal, everything is cold.
    """
    low, high = limits
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    step = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(scaled, step, HEAT[:, c]) for c in range(3)], axis=-1)


def class_tile(
    photo: Image.Image, class_hw: NDArray[np.integer], colours: NDArray[np.integer] = PALETTE
) -> Image.Image:
    """Patch classes 0, 1, ... in the palette's colours over the grey picture, with borders."""
    class_HW = enlarge(class_hw, photo)
    pixels_HW3 = _over_grey(photo, colours[class_HW % len(colours)], REGION_OPACITY)
    pixels_HW3[_near_another(class_HW, _border(photo))] = BORDER
    return Image.fromarray(pixels_HW3)


def colour_tile(photo: Image.Image, colour_hw3: Shaped[np.ndarray, "h w 3"]) -> Image.Image:
    """Patches in the given colours, 0 to 255; the picture only determines the size."""
    return Image.fromarray(enlarge(colour_hw3.round().astype(np.uint8), photo))


def mask_tile(photo: Image.Image, inside_hw: NDArray[np.bool_]) -> Image.Image:
    """The picture where the mask is true, and a pale version elsewhere."""
    return step_tile(photo, inside_hw, np.full(inside_hw.shape, np.nan), (0, 1))


def step_tile(
    photo: Image.Image,
    context_hw: NDArray[np.bool_],
    loss_hw: NDArray[np.floating],
    limits: tuple[float, float],
) -> Image.Image:
    """A prediction: the picture where it was seen, heat where it was predicted, else pale.

    `loss_hw` is NaN outside the target; white lines separate the three.
    """
    target_hw = np.isfinite(loss_hw)
    part_HW = enlarge(np.where(target_hw, 2, context_hw), photo)
    pixels_HW3 = _over_grey(photo, np.array(VEIL), VEIL_OPACITY)
    pixels_HW3[part_HW == 1] = np.asarray(photo)[part_HW == 1]
    heat = np.asarray(value_tile(photo, np.where(target_hw, loss_hw, limits[0]), limits))
    pixels_HW3[part_HW == 2] = heat[part_HW == 2]
    pixels_HW3[_near_another(part_HW, _border(photo))] = BORDER
    return Image.fromarray(pixels_HW3)


def region_tile(
    photo: Image.Image, rank_hw: NDArray[np.int64], count: int | None = None
) -> Image.Image:
    """`class_tile` of ranks, with each region's number, rank + 1. Ranks from `count` on are not
    regions."""
    tile = class_tile(photo, rank_hw)
    size = max(photo.size) / 10
    font, outline = ImageFont.load_default(size=size), round(size / 7)
    write = ImageDraw.Draw(tile)
    for rank in numbered(rank_hw, count):
        share_X = (np.array(label_patch(rank_hw == rank)) + 0.5) / rank_hw.shape
        side_X = np.array((photo.height, photo.width))
        y, x = np.clip(share_X * side_X, size / 2, side_X - size / 2)
        write.text((x, y), str(rank + 1), PAPER, font, "mm", stroke_width=outline, stroke_fill=INK)
    return tile


def numbered(rank_hw: NDArray[np.integer], count: int | None) -> list[int]:
    """The ranks that occur, below `count` if given."""
    return [rank for rank in np.unique(rank_hw).tolist() if count is None or rank < count]


def label_patch(inside_hw: NDArray[np.bool_]) -> tuple[int, int]:
    """The patch (row, column) for a region's number: inside the region, near its centroid.

    Patches whose eight neighbours are all in the region are preferred, so that a number covers
    little of another region; the grid's edge is not a region's edge.
    """
    padded = np.pad(inside_hw, 1, mode="edge")
    inner_hw = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).all(axis=(2, 3))
    patch_RX = np.argwhere(inner_hw if inner_hw.any() else inside_hw)
    away_RX = patch_RX - np.argwhere(inside_hw).mean(axis=0)
    row, column = patch_RX[(away_RX**2).sum(axis=1).argmin()]
    return int(row), int(column)


def _border(photo: Image.Image) -> int:
    return max(1, max(photo.size) // 128)


def _over_grey(photo: Image.Image, colour_HW3: np.ndarray, opacity: float) -> Pixels:
    grey_HW1 = np.asarray(photo.convert("L"), dtype=np.float64)[:, :, None]
    return (opacity * colour_HW3 + (1 - opacity) * grey_HW1).round().astype(np.uint8)


def enlarge(values_hw: Shaped[np.ndarray, "h w *_"], photo: Image.Image) -> np.ndarray:
    """Each pixel takes the value of its patch."""
    height, width = values_hw.shape[:2]
    row_H = np.arange(photo.height) * height // photo.height
    column_W = np.arange(photo.width) * width // photo.width
    return values_hw[row_H[:, None], column_W]


def _near_another(rank_HW: NDArray[np.int64], reach: int) -> NDArray[np.bool_]:
    """Pixels within `reach` rows and columns of another region."""
    near_HW = np.zeros(rank_HW.shape, dtype=bool)
    height, width = rank_HW.shape
    padded = np.pad(rank_HW, reach, mode="edge")
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            near_HW |= padded[down : down + height, right : right + width] != rank_HW
    return near_HW
