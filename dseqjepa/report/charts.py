"""The charts of a report: which metrics are drawn together, and what they mean.

A chart is plain JSON; the page's script knows no metric by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, takewhile
from statistics import fmean as mean
from typing import Any

from dseqjepa.report.lens import evenly
from dseqjepa.report.run import Run, Score, step_loss
from dseqjepa.report.words import alike, group_name
from dseqjepa.viz.topics import HEALTH, LEARNING, REGIONS, SCHEDULE, Topic

MOST_AT_LENGTH = 2
"""With more runs, details of single runs are collapsed."""
MOST_POINTS = 2000
"""Maximum number of log lines drawn per run, evenly spaced."""


def groups(
    runs: Sequence[Run], called: Callable[[Sequence[Run]], str] = group_name
) -> list[dict[str, Any]]:
    """The charts of some runs, in titled groups; charts without values are left out. Runs that
    differ only in their seed share one line, named by `called`."""
    titled = (
        ("Learning", LEARNING, False),
        ("Health", HEALTH, False),
        ("Regions", REGIONS, len(runs) > MOST_AT_LENGTH),
        ("Schedule and speed", SCHEDULE, True),
    )
    found, together = [], alike(runs)
    for title, topics, folded in titled:
        charts: list[dict[str, Any]] = []
        for topic in topics:
            if "loss_by_step" in topic.curves:
                charts += [
                    _by_step(topic, group, called(group) if len(runs) > 1 else "")
                    for group in together
                ]
            else:
                charts.append(_chart(topic, together, called))
        charts = [chart for chart in charts if chart["series"]]
        if charts:
            found.append({"title": title, "folded": folded, "charts": charts})
    return found


def interval_chart(task: str, metric: str, scores: Sequence[tuple[str, Score]]) -> dict[str, Any]:
    """Values with their intervals, one line each; `scores` contains (run, score)."""
    runs = list(dict.fromkeys(run for run, _ in scores))
    return {
        "title": task,
        "unit": "accuracy, %" if metric == "accuracy" else metric,
        "rows": [
            {
                "name": f"{run}: {score.encoder}" if len(runs) > 1 else score.encoder,
                "colour": runs.index(run) if len(runs) > 1 else index,
                "value": score.value,
                "low": score.value if score.low is None else score.low,
                "high": score.value if score.high is None else score.high,
            }
            for index, (run, score) in enumerate(scores)
        ],
    }


def _chart(
    topic: Topic, together: Sequence[Sequence[Run]], called: Callable[[Sequence[Run]], str]
) -> dict[str, Any]:
    """With several runs only the first curve, once for those that are `together`."""
    first, *others = topic.curves.items()
    runs = [run for group in together for run in group]
    if len(runs) > 1:
        series = [
            _series(called(group), group, first[0], colour) for colour, group in enumerate(together)
        ]
    else:
        curves = enumerate((first, *others))
        series = [_series(label, runs, key, colour) for colour, (key, label) in curves]
    meaning = topic.meaning
    if len(runs) > 1 and others:
        meaning += f" Drawn: {first[1]}."
    if len({run.config.method.name for run in runs}) > 1 and topic.unit == "loss":
        meaning += " Methods predict different patches: their losses are not comparable."
    if any("low" in item for item in series):
        meaning += " Bands span the lowest to the highest seed."
    return _plain(topic, topic.title, meaning, series)


def _by_step(topic: Topic, group: Sequence[Run], name: str) -> dict[str, Any]:
    """The loss of each prediction step; step k predicts region k + 1 from the regions before."""
    logged = {key for run in group for line in run.steps for key in line}
    numbers = takewhile(lambda k: step_loss(k) in logged, count(1))
    series = [_series(f"step {k}", group, step_loss(k), k - 1) for k in numbers]
    title = f"{topic.title}: {name}" if name else topic.title
    return _plain(topic, title, topic.meaning, series)


def _plain(
    topic: Topic, title: str, meaning: str, series: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    drawn = [item for item in series if item["x"]]
    return {"title": title, "meaning": meaning, "unit": topic.unit, "series": drawn}


def _series(name: str, group: Sequence[Run], key: str, colour: int) -> dict[str, Any]:
    """The steps at which a value was logged, and the values; for several runs the mean of those
    that logged any, where all of these have one, and the spread."""
    logged = [
        values
        for run in group
        if (
            values := {
                int(line["step"]): line[key] for line in (*run.steps, *run.probes) if key in line
            }
        )
    ]
    common = sorted(set.intersection(*map(set, logged))) if logged else []
    steps = evenly(common, MOST_POINTS)
    rows = [[values[step] for values in logged] for step in steps]
    if 0 < len(logged) < len(group):
        name = f"{name} ({len(logged)} of {len(group)} have values)"
    found = {"name": name, "colour": colour, "x": steps, "y": [mean(row) for row in rows]}
    if len(logged) > 1:
        found |= {"low": [min(row) for row in rows], "high": [max(row) for row in rows]}
    return found
