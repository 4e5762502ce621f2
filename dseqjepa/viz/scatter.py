"""Images as points on two principal components of their features, coloured by label.

Suffixes: M images, D width, K components (two).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from dseqjepa.viz.canvas import (
    SMALL,
    TEXT,
    WIDTH,
    Figure,
    Line2D,
    chart,
    colour,
    inches_of,
    new_page,
)
from dseqjepa.viz.pca import components
from dseqjepa.viz.style import INK, MUTED, PALETTE

MARKERS = "os^Dv"
MOST = len(MARKERS) * len(PALETTE)
"""Maximum number of distinguishable classes."""
LAYERS = 10
PANEL = 3.1


@dataclass(frozen=True, eq=False)
class Cloud:
    """One encoder's features of a data set's images."""

    label: str
    features_MD: Float[np.ndarray, "M D"]


def scatter(
    clouds: Sequence[Cloud],
    class_M: Int64[np.ndarray, " M"] | None,
    classes: Sequence[str],
    *,
    task: str = "class",
) -> Figure:
    """One panel per encoder: the first two principal components of the mean patch feature.

    Each class has a colour, and a marker if there are more classes than colours; beyond `MOST`
    classes, only the most common in the sample do. `class_M` is None for data without labels.
    """
    count = len(clouds[0].features_MD)
    legend, number_M = _legend(classes, class_M, count)
    width = min(PANEL, (WIDTH - 1.6 - 0.6 * len(clouds)) / len(clouds))
    head, left, gap = inches_of(TEXT) + 0.08, 0.45, 0.75
    beside = left + len(clouds) * width + (len(clouds) - 1) * gap + 0.2
    height = max(width, len(legend) * inches_of(SMALL) * 1.05)
    names = f"{len(classes)} labels of {task!r}" if legend else "no labels: one colour"
    page = new_page(
        beside + (1.5 if legend else 0.0),
        head + height + 0.45,
        "Images by their features",
        f"Each point is one of {count} images: the first two principal components (PC) of its mean "
        f"patch feature, with the share of variance of each; {names}.",
    )
    for index, cloud in enumerate(clouds):
        x = left + index * (width + gap)
        page.text(x + width / 2, 0, cloud.label, weight="bold", ha="center")
        axes = page.axes(x, head, width, width)
        axes.set_label(cloud.label)
        chart(axes)
        score_MK, share_K = components(cloud.features_MD, 2)
        # Draw in layers across classes, so that no class covers all others.
        for layer in range(LAYERS):
            for number in np.unique(number_M).tolist():
                chosen = (number_M == number) & (np.arange(count) % LAYERS == layer)
                axes.scatter(
                    score_MK[chosen, 0],
                    score_MK[chosen, 1],
                    s=9 if count > 400 else 18,
                    marker=_marker(number),
                    color=[_colour(number)],
                    edgecolors=[colour(INK)],
                    linewidths=0.2,
                    label=legend[number] if legend else "image",
                )
        axes.set_xlabel(f"PC 1 ({100 * share_K[0]:.0f} % of variance)", fontsize=SMALL)
        axes.set_ylabel(f"PC 2 ({100 * share_K[1]:.0f} %)", fontsize=SMALL, labelpad=1)
    marks = [
        Line2D([], [], linestyle="", marker=_marker(n), color=_colour(n), markersize=5)
        for n in range(len(legend))
    ]
    if legend:
        page.legend(beside, head, 0.1, legend, marks)
    return page.figure


def _legend(
    classes: Sequence[str], class_M: Int64[np.ndarray, " M"] | None, count: int
) -> tuple[Sequence[str], Int64[np.ndarray, " M"]]:
    """Class names (none without labels), and each image's index into them."""
    if class_M is None:
        return (), np.zeros(count, np.int64)
    if len(classes) <= MOST:
        return classes, class_M
    size_C = np.bincount(class_M, minlength=len(classes))
    common = np.sort((-size_C).argsort(kind="stable")[:MOST])
    place_C = np.full(len(classes), MOST)
    place_C[common] = np.arange(MOST)
    return [*(classes[number] for number in common), "any other"], place_C[class_M]


def _colour(number: int) -> tuple[float, float, float]:
    return colour(PALETTE[number % len(PALETTE)] if number < MOST else MUTED)


def _marker(number: int) -> str:
    return MARKERS[number // len(PALETTE) % len(MARKERS)]
