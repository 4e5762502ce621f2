"""A study's figures: paired differences with intervals, and learning curves with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dseqjepa.viz.canvas import (
    SMALL,
    TEXT,
    WIDTH,
    Axes,
    Figure,
    Line2D,
    chart,
    colour,
    inches_of,
    new_page,
    text_width,
)
from dseqjepa.viz.style import DASHES, INK, LINES, MUTED

Values = Mapping[str, Any]
MARKS = {"holds": ("o", 0), "the opposite holds": ("s", 1), "inconclusive": ("D", None)}
"""Verdict -> marker, and index into `LINES`; None: an open marker in the muted text colour."""
ROW = 0.32  # inches


def forest(claims: Sequence[Values], title: str) -> Figure:
    """Paired differences, one line per claim: mean, 95 % interval, and each seed's difference.

    Args:
        claims: tested claims, as in study.json.
    """
    groups = by_metric(claims)
    names = {id(c): claim_name(c) for c in claims}
    left = max(text_width(name, SMALL) for name in names.values()) + 0.15
    right = max(text_width(_numbers(c), SMALL) for c in claims) + 0.15
    head, foot = inches_of(TEXT) + 0.1, 0.5
    heights = [head + ROW * len(group) + foot for group in groups.values()]
    key = inches_of(TEXT) + 0.1
    page = new_page(
        WIDTH,
        key + sum(heights),
        f"Paired differences: {title}",
        "Mean over seeds of one variant's result minus the other's, with its 95 % interval by "
        "Student's t; small ticks are single seeds. Verdicts are after Holm's correction, so a "
        "claim may fail to hold although its interval excludes 0.",
    )
    marks = [_mark(verdict) for verdict in MARKS]
    page.legend(0, 0.04, WIDTH, list(MARKS), marks, TEXT)
    y = key
    for (unit, group), height in zip(groups.items(), heights, strict=True):
        page.text(0, y, unit, weight="bold")
        axes = page.axes(left, y + head, WIDTH - left - right, ROW * len(group))
        _draw(axes, group, unit)
        for number, claim in enumerate(group):
            at = y + head + ROW * (number + 0.5) - inches_of(SMALL) / 2
            page.text(0, at, names[id(claim)], SMALL)
            page.text(WIDTH - right + 0.1, at, _numbers(claim), SMALL, color=colour(MUTED))
        y += height
    return page.figure


def _draw(axes: Axes, group: Sequence[Values], unit: str) -> None:
    chart(axes)
    axes.set_label(unit)
    axes.axvline(0, color=colour(INK), linewidth=0.9)
    for number, claim in enumerate(group):
        mark = _mark(claim["verdict"])
        strong = mark.get_color()
        axes.plot(
            claim["differences"], [number] * len(claim["differences"]), linestyle="", marker="|",
            markersize=9, color=colour(INK), label="seeds",
        )  # fmt: skip
        axes.plot([claim["low"], claim["high"]], [number, number], color=strong, linewidth=1.8)
        axes.plot(
            [claim["mean"]], [number], marker=mark.get_marker(), markersize=7, color=strong,
            markerfacecolor=mark.get_markerfacecolor(), linestyle="", label="mean",
        )  # fmt: skip
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"difference in {unit}", fontsize=SMALL, color=colour(MUTED), labelpad=1)


def _mark(verdict: str) -> Line2D:
    marker, place = MARKS[verdict]
    rgb = colour(MUTED if place is None else LINES[place])
    face = "white" if place is None else rgb
    return Line2D([], [], color=rgb, marker=marker, markerfacecolor=face, linestyle="")


def by_metric(claims: Sequence[Values]) -> dict[str, list[Values]]:
    """Claims that share an axis: evaluation and metric -> claims."""
    groups: dict[str, list[Values]] = {}
    for claim in claims:
        groups.setdefault(f"{claim['evaluation']} {claim['metric']}", []).append(claim)
    return groups


def claim_name(claim: Values) -> str:
    late = " (exploratory)" if claim["exploratory"] else ""
    return f"{claim['higher']} > {claim['than']}, {claim['data']}{late}"


def _numbers(claim: Values) -> str:
    interval = f"({claim['low']:+.2f} to {claim['high']:+.2f})"
    return f"{claim['mean']:+.2f} {interval}, p {claim['p_holm']:.3f}"


def bands(charts: Sequence[Values], title: str) -> Figure:
    """Means over seeds with a band from the lowest to the highest, one chart per metric.

    Args:
        charts: as made by `report.charts`: title, unit, and series of name, x, y, low and high.
    """
    across = min(3, len(charts))
    names = list(dict.fromkeys(one["name"] for each in charts for one in each["series"]))
    left, gap, head, foot = 0.55, 0.75, inches_of(TEXT) + 0.08, 0.55
    width = (WIDTH - left - 2 * gap) / 3
    height = 0.65 * width
    longest = max(text_width(name, SMALL) for name in names) + 0.6
    rows = -(-len(names) // max(1, int(WIDTH / longest)))
    key = rows * inches_of(SMALL) * 1.1 + 0.15
    deep = -(-len(charts) // across)
    page = new_page(
        WIDTH,
        key + deep * (head + height + foot) - 0.15,
        f"Learning curves: {title}",
        "Mean over the seeds of each variant, by training step; bands span the lowest to the "
        "highest seed. Losses of methods that predict different patches are not comparable.",
    )
    marks = [Line2D([], [], **style_of(number)) for number in range(len(names))]
    page.legend(0, 0.04, WIDTH, names, marks, SMALL)
    for index, each in enumerate(charts):
        x, y = left + index % across * (width + gap), key + index // across * (head + height + foot)
        page.text(x - left + 0.02, y, each["title"], weight="bold")
        axes = page.axes(x, y + head, width, height)
        axes.set_label(each["title"])
        chart(axes)
        for one in each["series"]:
            style = style_of(names.index(one["name"]))
            axes.plot(one["x"], one["y"], label=one["name"], **style)
            if "low" in one:
                axes.fill_between(
                    one["x"], one["low"], one["high"], color=style["color"], alpha=0.18, linewidth=0
                )
        axes.margins(x=0.02)
        axes.set_xlabel("step", fontsize=SMALL, color=colour(MUTED), labelpad=1)
        axes.set_ylabel(each["unit"], fontsize=SMALL, color=colour(MUTED), labelpad=2)
    return page.figure


def style_of(number: int) -> dict[str, Any]:
    """The line style of a curve; dashes distinguish lines that coincide or share a colour."""
    dash = DASHES[(number + number // len(LINES)) % len(DASHES)]
    return {"color": colour(LINES[number % len(LINES)]), "linestyle": dash, "linewidth": 1.5}
