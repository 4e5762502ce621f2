"""Confusion matrices, with per-class accuracy.

Suffixes: C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dseqjepa.viz.canvas import (
    SMALL,
    Axes,
    Figure,
    Page,
    bare,
    colour,
    inches_of,
    new_page,
    shortened,
    text_width,
)
from dseqjepa.viz.style import INK, MUTED, PAPER
from dseqjepa.viz.tiles import heat_of

MOST = 30
"""Maximum number of classes shown: those with the most misclassified images."""
NUMBERED = 12
"""Up to this many classes, cells show numbers."""
CELL, SMALL_CELL = 0.42, 0.22
NAME = 1.5
"""Maximum width of a class name, in inches."""

Matrix = tuple[Mapping[str, Mapping[str, int]], Sequence[str]]
"""Non-zero counts of test images by true and predicted class, and the names of all classes."""


def confusion_sheet(matrices: Mapping[str, Matrix]) -> Figure:
    """One matrix per kind of label, stacked.

    Args:
        matrices: name of the labels -> matrix.
    """
    shown = {task: _table(*matrix) for task, matrix in matrices.items()}
    plans = {task: _Plan(names) for task, (_, names) in shown.items()}
    height = sum(plan.height for plan in plans.values())
    left_out = any(len(names) > MOST for _, names in matrices.values())
    page = new_page(
        max(plan.width for plan in plans.values()),
        height,
        "Confusion matrix",
        "For the test images of each class (a row), the share predicted as each class (a "
        "column), in per cent; the diagonal is correct. To the right, the number of test "
        "images."
        + (
            f" Only the {MOST} classes with the most confused images; the others "
            "are in the result file."
            if left_out
            else ""
        ),
    )
    y = 0.0
    for task, (count_CC, names) in shown.items():
        _draw(page, y, task, count_CC, names, plans[task])
        y += plans[task].height
    return page.figure


class _Plan:
    """The layout, in inches."""

    def __init__(self, names: Sequence[str]) -> None:
        self.cell = CELL if len(names) <= NUMBERED else SMALL_CELL
        self.name = max(text_width(shortened(name, NAME, SMALL), SMALL) for name in names) + 0.1
        self.side = self.cell * len(names)
        self.head = inches_of(SMALL) + 0.1
        self.width = self.name + self.side + 0.7
        self.height = self.head + self.name + self.side + 0.25


def _table(
    found: Mapping[str, Mapping[str, int]], names: Sequence[str]
) -> tuple[NDArray[np.int64], Sequence[str]]:
    """A matrix of counts with row totals; with many classes, only the worst."""
    if len(names) > MOST:
        wrong = {name: sum(said.values()) - said.get(name, 0) for name, said in found.items()}
        chosen = set(sorted(wrong, key=lambda name: -wrong[name])[:MOST])
        names = [name for name in names if name in chosen]
    count_CC = [[found.get(true, {}).get(said, 0) for said in names] for true in names]
    total_C = [sum(found.get(true, {}).values()) for true in names]
    return np.column_stack([count_CC, total_C]).astype(np.int64), names


def _draw(
    page: Page, y: float, task: str, table: NDArray[np.int64], names: Sequence[str], plan: _Plan
) -> None:
    count_CC, total_C = table[:, :-1], table[:, -1]
    share_CC = 100 * count_CC / np.maximum(total_C, 1)[:, None]
    page.text(0, y, f"{task}: rows are true, columns predicted", SMALL,
              color=colour(MUTED))  # fmt: skip
    top = y + plan.head + plan.name
    axes = page.axes(plan.name, top, plan.side, plan.side)
    pixels = heat_of(share_CC, (0.0, 100.0)).astype(np.uint8)
    classes = len(names)
    axes.imshow(pixels, extent=(0, classes, classes, 0), aspect="auto", interpolation="nearest")
    bare(axes)
    for place, name in enumerate(names):
        middle = (place + 0.5) * plan.cell
        text = shortened(name, NAME, SMALL)
        page.text(plan.name - 0.06, top + middle - inches_of(SMALL) / 2, text, SMALL, ha="right")
        _upright(axes, place + 0.5, text)
        below = top + middle - inches_of(SMALL) / 2
        page.text(plan.name + plan.side + 0.08, below, str(total_C[place]), SMALL,
                  color=colour(MUTED))  # fmt: skip
    if classes <= NUMBERED:
        for true, said in np.ndindex(classes, classes):
            share = share_CC[true, said]
            axes.text(
                said + 0.5,
                true + 0.5,
                f"{share:.0f}",
                fontsize=SMALL,
                color=colour(INK if share > 55 else PAPER),
                ha="center",
                va="center_baseline",
            )


def _upright(axes: Axes, x: float, text: str) -> None:
    axes.text(
        x, -0.12, text, fontsize=SMALL, color=colour(INK), rotation=90, ha="center", va="bottom",
        parse_math=False,
    )  # fmt: skip
