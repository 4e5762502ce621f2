"""Sheets of images with their saliency and numbered regions.

Suffixes: B images, N patches, h and w rows and columns of patches, H and W pixels, 3 colours
(last in memory here, as Pillow has them), R patches of one region, X axes (row, column).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dseqjepa.data.loader import read
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.keyed import sample_keys
from dseqjepa.methods.base import Method
from dseqjepa.viz.style import INK, PAPER
from dseqjepa.viz.tiles import heat_tile, photo_of, region_tile
from dseqjepa.viz.trace import draw_to_show

PICTURES = 6
"""Number of images in a picture drawn during training."""
HEADINGS = ("image", "saliency", "regions, in order")


def draw_regions(
    images_BCHW: UInt8[Tensor, "B 3 _ _"],
    saliency_BN: Float[Tensor, "B N"],
    rank_BN: Int64[Tensor, "B N"],
    grid: tuple[int, int],
    count_B: Int64[Tensor, " B"] | None = None,
    *,
    columns: int = 3,
    cell: int = 192,
) -> Image.Image:
    """A sheet of triples: image, saliency (each map scaled to its own range), numbered regions.

    A region's number is its rank + 1, the left-over region included.

    Args:
        grid: rows and columns of patches; their product is N.
        count_B: number of regions per image; ranks from it on are not regions. None: all are.
        columns: triples side by side.
        cell: longer side, in pixels, of each of the three.

    Raises:
        InputError: inconsistent shapes, no image, or non-finite saliency.
    """
    _check(images_BCHW, saliency_BN, rank_BN, grid)
    height, width = images_BCHW.shape[-2:]
    tile_W, tile_H = (round(cell * side / max(height, width)) for side in (width, height))
    gap, margin, heading = cell // 32, cell // 8, cell // 8
    columns = min(columns, len(images_BCHW))
    rows = -(-len(images_BCHW) // columns)
    step_x, step_y = 3 * tile_W + 2 * gap + margin, tile_H + margin
    sheet = Image.new("RGB", (margin + columns * step_x, margin + heading + rows * step_y), PAPER)

    write = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=tile_W / 14)
    for column in range(columns):
        for part, text in enumerate(HEADINGS):
            centre = margin + column * step_x + part * (tile_W + gap) + tile_W / 2
            write.text((centre, margin), text, fill=INK, font=font, anchor="mm")

    for number, image_CHW in enumerate(images_BCHW.cpu()):
        photo = photo_of(image_CHW, cell)
        saliency_hw = saliency_BN[number].detach().cpu().double().numpy().reshape(grid)
        rank_hw = rank_BN[number].cpu().numpy().reshape(grid)
        count = None if count_B is None else int(count_B[number])
        left = margin + number % columns * step_x
        top = margin + heading + number // columns * step_y
        tiles = (photo, heat_tile(photo, saliency_hw), region_tile(photo, rank_hw, count))
        for part, tile in enumerate(tiles):
            sheet.paste(tile, (left + part * (tile_W + gap), top))
    return sheet


@torch.no_grad()
def regions_picture(
    method: Method, images_BCHW: UInt8[Tensor, "B 3 _ _"], keys_B: Int64[Tensor, " B"]
) -> Image.Image:
    """`draw_regions` for a method at the end of its curriculum (`draw_to_show`)."""
    drawing = draw_to_show(method, images_BCHW, keys_B)
    grid = method.target.grid_of(images_BCHW)
    found = drawing.regions
    return draw_regions(images_BCHW, drawing.saliency_BN, found.rank_BN, grid, found.count_B)


def training_picture(
    source: Source, image_size: tuple[int, int], seed: int
) -> Callable[[Method], Image.Image]:
    """Return a function that draws a method on `PICTURES` fixed images of a source.

    Images that cannot be decoded are left out; `InputError` if none can be.
    """

    def draw(method: Method) -> Image.Image:
        count = min(PICTURES, len(source))
        index_B = torch.arange(count) * len(source) // max(count, 1)
        done = read(source, index_B, EvalTransform(image_size), index_B)
        if not len(done.images_BCHW):
            raise InputError(f"none of {count} images to draw can be decoded")
        keys_B = sample_keys(seed, 0, index_B[done.kept_B])
        device = next(method.parameters()).device
        return regions_picture(method, done.images_BCHW.to(device), keys_B.to(device))

    return draw


def _check(
    images_BCHW: Tensor, saliency_BN: Tensor, rank_BN: Tensor, grid: tuple[int, int]
) -> None:
    wanted = (len(images_BCHW), grid[0] * grid[1])
    if len(images_BCHW) == 0:
        raise InputError("expected at least one image to draw, found none")
    for name, values_BN in (("saliency", saliency_BN), ("ranks", rank_BN)):
        if tuple(values_BN.shape) != wanted:
            raise InputError(
                f"{name} of {wanted[0]} images on a {grid[0]} x {grid[1]} grid must be {wanted}, "
                f"found {tuple(values_BN.shape)}"
            )
    if not saliency_BN.isfinite().all():
        raise InputError("saliency is non-finite: the encoder has diverged, use an earlier one")
