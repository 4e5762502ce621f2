"""Similarity of all patches in an image to a chosen one, over a run's checkpoints.

Suffixes: B images, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dseqjepa.errors import InputError
from dseqjepa.viz.canvas import SMALL, Axes, Figure, Rectangle, colour, inches_of, tile_table
from dseqjepa.viz.moments import Moment, rows_of_tiles, spans
from dseqjepa.viz.style import INK, PAPER
from dseqjepa.viz.tiles import value_tile


def check_patch(patch: tuple[int, int] | None, grid: tuple[int, int]) -> tuple[int, int]:
    """The patch, or the middle one if None; `InputError` if it is outside the grid."""
    rows, columns = grid
    row, column = patch or (rows // 2, columns // 2)
    if not (0 <= row < rows and 0 <= column < columns):
        raise InputError(
            f"patch {row},{column} is outside the grid: expected a row from 0 to {rows - 1} and a "
            f"column from 0 to {columns - 1}"
        )
    return row, column


def similarities(features_BND: Float[np.ndarray, "B N D"], patch: int) -> Float[np.ndarray, "B N"]:
    """Cosine between each patch and the chosen one of its image."""
    length_BN1 = np.linalg.norm(features_BND, axis=2, keepdims=True)
    unit_BND = features_BND / np.where(length_BN1 > 0, length_BN1, 1)
    return np.einsum("bnd,bd->bn", unit_BND, unit_BND[:, patch])


def similarity_maps(
    images_BCHW: UInt8[Tensor, "B 3 _ _"],
    moments: Sequence[Moment],
    grid: tuple[int, int],
    *,
    patch: tuple[int, int] | None = None,
) -> Figure:
    """One row per image, one column per checkpoint: cosine to the framed patch.

    Args:
        patch: row and column from 0; the middle of the grid if None.

    Raises:
        InputError: a patch outside the grid.
    """
    row, column = check_patch(patch, grid)
    values = [
        similarities(item.features_BND, row * grid[1] + column).reshape(-1, *grid)
        for item in moments
    ]
    low = min(float(value.min()) for value in values)

    def draw(photo: Image.Image, value_hw: np.ndarray) -> Image.Image:
        return value_tile(photo, value_hw, (low, 1.0))

    table = tile_table(
        rows_of_tiles(images_BCHW, values, draw),
        ["image", *(item.name for item in moments)],
        grid,
        title=f"Similarity to the patch in row {row}, column {column}",
        caption=(
            "Cosine between the features of the framed patch and those of every other patch of the "
            "same image; one scale for all maps. Rows and columns count from 0, top left."
        ),
        spans=spans(moments),
        room=0.2 + 3 * inches_of(SMALL),
    )
    for line in table.axes:
        for axes in line:
            _frame(axes, row, column)
    table.page.heat_bar(0, table.below + 0.12, 2.4, "cosine similarity", (f"{low:.2f}", "1.00"))
    return table.figure


def _frame(axes: Axes, row: int, column: int) -> None:
    for width, rgb in ((3.0, INK), (1.4, PAPER)):
        axes.add_patch(
            Rectangle((column, row), 1, 1, fill=False, linewidth=width, edgecolor=colour(rgb))
        )
