"""A mask as COCO writes it: polygons along the edges of its pixels, or run lengths.

Suffixes: H and W pixels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

Point = tuple[int, int]


def polygons(mask_HW: Bool[np.ndarray, "H W"]) -> list[list[int]] | None:
    """A polygon (x0, y0, x1, y1, ...) for every 4-connected part; None where one has a hole, which
    polygons cannot say."""
    framed = np.pad(mask_HW, 1)
    after: dict[Point, list[Point]] = {}
    for row, column in np.argwhere(mask_HW).tolist():
        x, y = column, row
        corners = (x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)  # clockwise from the top left
        neighbours = (y, x + 1), (y + 1, x + 2), (y + 2, x + 1), (y + 1, x)  # above, right, ...
        for side, place in enumerate(neighbours):
            if not framed[place]:
                after.setdefault(corners[side], []).append(corners[(side + 1) % 4])
    loops = []
    while after:
        start = next(iter(after))
        loop = [start]
        while True:
            here = loop[-1]
            there = _next(loop, after[here])
            after[here].remove(there)
            if not after[here]:
                del after[here]
            if there == start:
                break
            loop.append(there)
        if _area(loop) < 0:
            return None
        loops.append([number for point in _corners(loop) for number in point])
    return loops


def _next(loop: list[Point], options: list[Point]) -> Point:
    """Where two pixels touch at a corner, the edge of the same pixel: the turn to the right."""
    if len(options) == 1 or len(loop) == 1:
        return options[0]
    (x0, y0), (x1, y1) = loop[-2:]
    return (x1 - (y1 - y0), y1 + (x1 - x0))


def _corners(loop: list[Point]) -> list[Point]:
    """The points at which it turns."""
    turns = []
    for before, here, there in zip([loop[-1], *loop], loop, [*loop[1:], loop[0]], strict=False):
        if (here[0] - before[0], here[1] - before[1]) != (there[0] - here[0], there[1] - here[1]):
            turns.append(here)
    return turns


def _area(loop: list[Point]) -> int:
    """Twice the area, positive where the loop runs clockwise on the screen: around pixels."""
    ends = zip(loop, [*loop[1:], loop[0]], strict=True)
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in ends)


def run_lengths(mask_HW: Bool[np.ndarray, "H W"]) -> dict[str, list[int]]:
    """Pixels column by column: how many are outside, then inside, and so on."""
    inside = np.concatenate(([False], mask_HW.T.ravel()))
    ends = np.flatnonzero(inside[1:] != inside[:-1])
    counts = np.diff(np.concatenate(([0], ends, [mask_HW.size])))
    return {"counts": counts.tolist(), "size": list(mask_HW.shape)}
