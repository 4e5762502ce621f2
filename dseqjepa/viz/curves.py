"""Training curves: the metrics of metrics.jsonl by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dseqjepa.errors import InputError
from dseqjepa.train import metrics as metrics_file
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
)
from dseqjepa.viz.style import DASHES, INK, LINES, MUTED
from dseqjepa.viz.topics import TOPICS, Topic

Metrics = Sequence[Mapping[str, Any]]


ACROSS = 3


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a truncated last line.

    Raises:
        InputError: there is no such file, or it contains no metrics.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run} has no metrics.jsonl: curves need the folder of a run")
    rows, damaged = metrics_file.read_metrics(path)
    damaged.pop(len(rows) + len(damaged), None)
    for number, problem in damaged.items():
        raise InputError(f"{path}: line {number} {problem}")
    if not rows:
        raise InputError(f"{path} contains no metrics: let the run log a step")
    return rows


def series_of(metrics: Metrics, key: str) -> dict[str, tuple[list[int], list[float]]]:
    """A metric's steps and values; a list gives one series per entry, numbered from 1.

    Lines without the metric and null entries are left out.
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in metrics:
        value = row.get(key)
        values = enumerate(value, start=1) if isinstance(value, list) else [("", value)]
        for name, number in values:
            if number is not None:
                steps, numbers = series.setdefault(str(name), ([], []))
                steps.append(int(row["step"]))
                numbers.append(float(number))
    return series


def curves(runs: Mapping[str, Metrics]) -> Figure:
    """One chart per topic, by training step; runs are distinguished by dashes.

    Args:
        runs: run's label -> its metrics, from `read_metrics`.

    Metrics that no run has (regions for I-JEPA, a disabled probe) get no chart.
    """
    panels = [
        panel
        for panel in TOPICS
        if any(series_of(rows, key) for rows in runs.values() for key in panel.curves)
    ]
    across = min(ACROSS, len(panels))
    left, gap, head, foot = 0.55, 0.75, inches_of(TEXT) + 0.08, 0.55
    width = (WIDTH - left - (ACROSS - 1) * gap) / ACROSS
    height = 0.6 * width
    legend = inches_of(TEXT) + 0.1 if len(runs) > 1 else 0.0
    deep = -(-len(panels) // across)
    page = new_page(
        WIDTH,
        legend + deep * (head + height + foot) - 0.15,
        "Training curves" + (f": {next(iter(runs))}" if len(runs) == 1 else ""),
        "Means over the steps between two log lines, by training step. RankMe, standard deviation "
        "and similarity are those of the target's mean features of a batch: they fall, or rise to "
        "1, if features collapse. The probe is leave-one-out on training images."
        + (" Dashes distinguish the runs." if len(runs) > 1 else ""),
    )
    if len(runs) > 1:
        marks = [Line2D([], [], color=_line(n), linestyle=_dash(n)) for n in range(len(runs))]
        page.legend(0, 0.04, WIDTH, list(runs), marks, TEXT)
    for index, panel in enumerate(panels):
        x = left + index % across * (width + gap)
        y = legend + index // across * (head + height + foot)
        page.text(x - left + 0.02, y, panel.title, weight="bold")
        axes = page.axes(x, y + head, width, height)
        axes.set_label(panel.title)
        _draw(axes, panel, runs)
        axes.set_xlabel("step", fontsize=SMALL, color=colour(MUTED), labelpad=1)
        axes.set_ylabel(panel.unit, fontsize=SMALL, color=colour(MUTED), labelpad=2)
    return page.figure


def _draw(axes: Axes, panel: Topic, runs: Mapping[str, Metrics]) -> None:
    chart(axes)
    found = [
        [
            (f"{name} {entry}".strip(), points)
            for key, name in panel.curves.items()
            for entry, points in series_of(rows, key).items()
        ]
        for rows in runs.values()
    ]
    names = list(dict.fromkeys(name for lines in found for name, _ in lines))
    for number, (label, lines) in enumerate(zip(runs, found, strict=True)):
        for name, (steps, values) in lines:
            axes.plot(
                steps,
                values,
                color=_line(names.index(name) if len(names) > 1 else number),
                linestyle=_dash(number),
                linewidth=1.5,
                marker="o" if len(steps) < 12 else None,
                markersize=3.5,
                label=f"{label}/{name}",
            )
    if len(names) > 1:
        keys = [Line2D([], [], color=_line(place), linewidth=1.5) for place in range(len(names))]
        axes.legend(
            keys, names, fontsize=SMALL, frameon=False, labelcolor=colour(INK), handlelength=1.2,
            borderaxespad=0.1, labelspacing=0.25, ncols=2 if len(names) > 3 else 1,
            columnspacing=1.0,
        )  # fmt: skip
    if panel.at_zero:
        axes.set_ylim(bottom=0)
    axes.margins(x=0.02)


def _line(number: int) -> tuple[float, float, float]:
    return colour(LINES[number % len(LINES)])


def _dash(number: int) -> Any:
    return DASHES[number % len(DASHES)]
