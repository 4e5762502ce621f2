"""Everything a method does with one image: saliency, foreground, regions, prediction steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from dseqjepa.viz.canvas import (
    GAP,
    SMALL,
    TEXT,
    TILE_PIXELS,
    WIDTH,
    Figure,
    Page,
    bare,
    colour,
    inches_of,
    new_page,
    shortened,
    write_numbers,
)
from dseqjepa.viz.style import INK, MUTED, PALETTE, RULE
from dseqjepa.viz.tiles import class_tile, heat_tile, mask_tile, photo_of, step_tile
from dseqjepa.viz.trace import PredictionStep, Trace

KINDS = {
    "cls_similarity": "similarity to [CLS]",
    "cls_attention": "attention of [CLS]",
    "grad_cam": "label-free Grad-CAM",
    "rarity": "rarity of its content",
}
ACROSS = 5
TILE = (WIDTH - (ACROSS - 1) * GAP) / ACROSS
HEAD = inches_of(TEXT) + 0.05
NOTE = inches_of(SMALL) + 0.04
CAPTION = (
    "Saliency is scaled to this image. The foreground lies above Otsu's threshold; only components "
    "are cut from it. Regions are numbered from the most salient; of components, the last is the "
    "left-over region. A prediction step shows the patches that the context encoder sees, and the "
    "loss of each predicted patch as heat; greyed patches are neither."
)


def image_sheet(
    image_CHW: UInt8[Tensor, "3 _ _"], traces: Sequence[tuple[str, Trace]], *, title: str
) -> Figure:
    """Two rows per method: input, saliency, foreground, regions; then its prediction steps.

    Args:
        traces: (method's label, its trace of this image); all losses share one scale.
    """
    photo = photo_of(image_CHW, TILE_PIXELS)
    tile_height = TILE * photo.height / photo.width
    row = HEAD + tile_height + NOTE + 1.6 * GAP
    block_heights = [inches_of(TEXT) + 0.1 + (1 + _rows(item.steps)) * row for _, item in traces]
    page = new_page(WIDTH, sum(block_heights) - GAP, shortened(title, WIDTH - 1.0, 13), CAPTION)
    steps = [step for _, item in traces for step in item.steps]
    worst = max((float(np.nanmax(step.loss_hw)) for step in steps), default=0.0)
    longest = max((step.loss for step in steps), default=0.0)
    y = 0.0
    for (label, item), height in zip(traces, block_heights, strict=True):
        page.text(0, y, label, weight="bold")
        page.rule(0, y + inches_of(TEXT) + 0.02, WIDTH, RULE)
        inner = y + inches_of(TEXT) + 0.1
        regions = "1 region" if item.count == 1 else f"{item.count} regions"
        cells = [
            ("input", photo, f"{image_CHW.shape[2]} x {image_CHW.shape[1]} px"),
            ("saliency", heat_tile(photo, item.saliency_hw), KINDS[item.saliency_kind]),
            (
                "Otsu foreground",
                mask_tile(photo, item.foreground_hw),
                f"{100 * item.foreground_hw.mean():.0f} % of the patches",
            ),
            ("regions", class_tile(photo, item.rank_hw), f"{regions}, in order"),
        ]
        grid = item.rank_hw.shape
        for column, (head, tile, note) in enumerate(cells):
            x = column * (TILE + GAP)
            page.text(x, inner, head)
            axes = page.tile(x, inner + HEAD, TILE, tile, grid)
            page.text(x, inner + HEAD + tile_height + 0.03, note, SMALL, color=colour(MUTED))
            if head == "regions":
                write_numbers(axes, item.rank_hw, count=item.count)
        for index, step in enumerate(item.steps):
            x = index % (ACROSS - 1) * (TILE + GAP)
            below = inner + (1 + index // (ACROSS - 1)) * row
            page.text(x, below, f"step {step.number}: {_what(item, step)}")
            tile = step_tile(photo, step.context_hw, step.loss_hw, (0, worst))
            page.tile(x, below + HEAD, TILE, tile, grid)
            note = f"sees {step.context_hw.sum()}, predicts {step.target_hw.sum()} patches"
            page.text(x, below + HEAD + tile_height + 0.03, note, SMALL, color=colour(MUTED))
        x = (ACROSS - 1) * (TILE + GAP)
        end = _losses(page, x, inner, item, longest)
        if y == 0:  # the scales are the same for all
            page.heat_bar(x, end, TILE, "loss of one patch", ("0", f"{worst:.2f}"))
            end += 2 * inches_of(SMALL) + 0.32
            page.heat_bar(x, end, TILE, "saliency", ("lowest", "highest"))
        y += height
    return page.figure


def _rows(steps: Sequence[PredictionStep]) -> int:
    return max(1, -(-len(steps) // (ACROSS - 1)))


def _what(item: Trace, step: PredictionStep) -> str:
    """`1, 2 → 3` for regions, `block 2` for random blocks."""
    if not item.is_ranked:
        return f"block {step.number}"
    seen = [str(rank + 1) for rank in np.unique(item.rank_hw[step.context_hw])]
    predicted = [str(rank + 1) for rank in np.unique(item.rank_hw[step.target_hw])]
    return f"{', '.join(seen)} → {', '.join(predicted)}"


def _losses(page: Page, x: float, y: float, item: Trace, longest: float) -> float:
    """One bar per step, in the colour of the predicted region; returns where they end."""
    page.text(x, y, "loss by step")
    height = 0.3 * max(len(item.steps), 1)
    axes = page.axes(x + 0.2, y + HEAD, TILE - 0.2, height)
    bare(axes)
    axes.set_xlim(0, longest * 1.45 or 1)
    axes.set_ylim(max(len(item.steps), 1) - 0.5, -0.5)
    for index, step in enumerate(item.steps):
        rank = step.number if item.is_ranked else 0
        axes.barh(index, step.loss, 0.62, color=colour(PALETTE[rank % len(PALETTE)]))
        axes.text(step.loss + longest * 0.03, index, f"{step.loss:.3f}", fontsize=SMALL,
                  va="center", color=colour(INK))  # fmt: skip
        axes.text(-longest * 0.04, index, str(step.number), fontsize=SMALL, va="center",
                  ha="right", color=colour(MUTED))  # fmt: skip
    note = "Smooth-L1, mean over the\npredicted patches" + (
        "" if item.is_ranked else ";\nrandom blocks"
    )
    below = y + HEAD + height + 0.06
    page.text(x, below, note, SMALL, color=colour(MUTED))
    return below + (note.count("\n") + 1) * inches_of(SMALL) + 0.12
