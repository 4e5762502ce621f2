"""Random rectangles on the patch grid: I-JEPA's context and target blocks (arXiv 2301.08243).

Every rectangle is a pure function of its image's key: an image's blocks do not depend on its batch,
and no block is truncated to the size of another image's, unless `truncate` is set.

Suffixes: B images, M rectangles of an image, N patches of a grid (row-major), H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, uniforms

DRAWS = 4  # uniform numbers that one rectangle takes: area, aspect, row, column
SQUARE = (1.0, 1.0)

Range = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Blocks:
    """I-JEPA's blocks of every image: targets, which may overlap, and a context without them.

    On very small grids the targets can cover the whole context block; the context is then empty.
    """

    context_BN: Bool[Tensor, "B N"]
    target_BMN: Bool[Tensor, "B M N"]


def sample_blocks(
    keys_B: Int64[Tensor, " B"],
    grid: tuple[int, int],
    *,
    targets: int = 4,
    target_area: Range = (0.15, 0.2),
    target_aspect: Range = (0.75, 1.5),
    context_area: Range = (0.85, 1.0),
    truncate: bool = False,
) -> Blocks:
    """Draw `targets` target blocks and one square context block, minus all targets, per image.

    Args:
        keys_B: the images' keys, used with `Stream.BLOCKS`.
        grid: rows and columns of patches; their product is N.
        targets: the number M of target blocks.
        target_area: lowest and highest fraction of the grid that a target block covers.
        target_aspect: lowest and highest height / width of a target block.
        context_area: lowest and highest fraction of the grid that the context block covers.
        truncate: use one context size and one target size for the whole batch, drawn by its first
            image's key, and cut every context to the batch's shortest non-empty one, keeping its
            first patches in row-major order (as facebookresearch's I-JEPA does).

    Sizes and positions are those of `sample_rectangles`.

    Raises:
        InputError: a range that no block can have.
    """
    # The context is drawn first, so that it does not depend on the number of targets.
    uniform_BMD = _draws(keys_B, Stream.BLOCKS, 1 + targets)
    if truncate:  # the first two numbers are a rectangle's size
        uniform_BMD[:, :1, :2] = uniform_BMD[:1, :1, :2].clone()
        uniform_BMD[:, 1:, :2] = uniform_BMD[:1, 1:2, :2].clone()
    context_B1N = _rectangles(uniform_BMD[:, :1], grid, context_area, SQUARE)
    target_BMN = _rectangles(uniform_BMD[:, 1:], grid, target_area, target_aspect)
    context_BN = context_B1N[:, 0] & ~target_BMN.any(dim=1)
    if truncate:
        place_BN = context_BN.cumsum(dim=1)
        length_B = place_BN[:, -1]
        context_BN &= place_BN <= length_B.where(length_B > 0, grid[0] * grid[1]).amin()
    return Blocks(context_BN, target_BMN)


def scatter_patches(
    keys_B: Int64[Tensor, " B"], grid: tuple[int, int], mask_ratio: float
) -> Blocks:
    """One target of single patches drawn uniformly without replacement; the rest is the context.

    Args:
        keys_B: the images' keys, used with `Stream.SCATTER`.
        grid: rows and columns of patches; their product is N, at least 2.
        mask_ratio: the share of patches in the target, rounded, but neither none nor all of them.
    """
    patches = grid[0] * grid[1]
    masked = min(max(round(mask_ratio * patches), 1), patches - 1)
    order_BN = uniforms(keys_B, Stream.SCATTER, patches).argsort(dim=1, stable=True)
    target_BN = order_BN.argsort(dim=1, stable=True) < masked
    return Blocks(~target_BN, target_BN[:, None])


def sample_rectangles(
    keys_B: Int64[Tensor, " B"],
    grid: tuple[int, int],
    count: int,
    *,
    area: Range,
    aspect: Range,
    stream: Stream,
) -> Bool[Tensor, "B M N"]:
    """Draw `count` rectangles for every image: area and aspect uniform and independent.

    Sides are whole patches: the number of patches is within max(height, width) / 2 of
    the number drawn (at least one). A rectangle too tall or too wide for the grid keeps its
    area and changes its aspect. Every position inside the grid is equally likely.

    Args:
        keys_B: the images' keys.
        grid: rows and columns of patches; their product is N.
        count: the number M of rectangles.
        area: lowest and highest fraction of the grid, in (0, 1].
        aspect: lowest and highest height / width.
        stream: what the rectangles are for; different streams are independent.

    Raises:
        InputError: a range that no rectangle can have.
    """
    return _rectangles(_draws(keys_B, stream, count), grid, area, aspect)


def _draws(keys_B: Int64[Tensor, " B"], stream: Stream, count: int) -> Float64[Tensor, "B M 4"]:
    return uniforms(keys_B, stream, count * DRAWS).unflatten(1, (count, DRAWS))


def _rectangles(
    uniform_BM4: Float64[Tensor, "B M 4"], grid: tuple[int, int], area: Range, aspect: Range
) -> Bool[Tensor, "B M N"]:
    if not 0 < area[0] <= area[1] <= 1:
        raise InputError(f"a block's area must be 0 < lowest <= highest <= 1, found {area}")
    if not 0 < aspect[0] <= aspect[1]:
        raise InputError(f"a block's aspect must be 0 < lowest <= highest, found {aspect}")
    rows, columns = grid
    for_area_BM, for_aspect_BM, for_row_BM, for_column_BM = uniform_BM4.unbind(-1)
    area_BM = rows * columns * _between(area, for_area_BM)
    aspect_BM = _between(aspect, for_aspect_BM)

    fewest_rows_BM = (area_BM / columns).round()  # fewer, and the grid is too narrow for the area
    height_BM = (area_BM * aspect_BM).sqrt().round().maximum(fewest_rows_BM).clamp(1, rows)
    width_BM = (area_BM / height_BM).round().clamp(1, columns)
    inside_BMH = _span(height_BM, for_row_BM, rows)
    inside_BMW = _span(width_BM, for_column_BM, columns)
    return (inside_BMH[..., :, None] & inside_BMW[..., None, :]).flatten(2)


def _between(limits: Range, uniform_BM: Float64[Tensor, "B M"]) -> Float64[Tensor, "B M"]:
    return limits[0] + (limits[1] - limits[0]) * uniform_BM


def _span(
    length_BM: Float64[Tensor, "B M"], uniform_BM: Float64[Tensor, "B M"], side: int
) -> Bool[Tensor, "B M side"]:
    """The cells of a side that an interval of this length covers, at a uniform position."""
    first_BM1 = (uniform_BM * (side - length_BM + 1)).floor()[..., None]
    cell = torch.arange(side, device=length_BM.device)
    return (cell >= first_BM1) & (cell < first_BM1 + length_BM[..., None])
