"""The curves of a report: which metrics are drawn together, and what each means.

A chart is plain JSON: the page draws it and knows no metric by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from statistics import fmean as mean
from typing import Any

from dseqjepa.report.lens import evenly
from dseqjepa.report.run import Run, Score, step_loss
from dseqjepa.report.words import alike, group_name

MOST_POINTS = 2000
"""Of a run that logged more lines, so many are drawn, evenly spaced."""


@dataclass(frozen=True)
class Curve:
    key: str
    label: str


@dataclass(frozen=True)
class Spec:
    """One chart; with several runs, only the first curve is drawn, once for the runs that differ
    in their seed alone."""

    title: str
    meaning: str
    unit: str
    curves: tuple[Curve, ...]


LEARNING = (
    Spec(
        "Prediction loss",
        "Smooth-L1 between predicted and target features. It may rise while the run goes well, "
        "because the targets become richer: read it beside the loss of always predicting the mean.",
        "loss",
        (
            Curve("prediction_loss", "prediction"),
            Curve("mean_prediction_loss", "predicting the mean"),
            Curve("loss", "with regulariser"),
        ),
    ),
    Spec(
        "Skill",
        "1 − loss / loss of predicting the mean: 0 means nothing was learnt beyond the mean.",
        "share",
        (Curve("skill", "skill"),),
    ),
    Spec(
        "kNN probe",
        "Leave-one-out on labelled training images. It shows a trend, not an accuracy.",
        "% right",
        (Curve("probe_knn", "kNN probe"),),
    ),
)
HEALTH = (
    Spec(
        "Effective rank (RankMe)",
        "How many dimensions the mean target features of a batch use. Falling far below the start "
        "is collapse.",
        "dimensions",
        (Curve("rank_me", "RankMe"),),
    ),
    Spec(
        "Likeness of different images",
        "Mean cosine between the features of two images. At 1 all images look alike.",
        "cosine",
        (Curve("cosine", "cosine"),),
    ),
    Spec(
        "Spread of the features",
        "Standard deviation over images, mean over the features.",
        "standard deviation",
        (Curve("feature_std", "spread"),),
    ),
    Spec(
        "What the features hold",
        "Shares of the variance of single patches' target features: by place (where a patch is, "
        "whatever the image), by image (what its patches share), and what is left.",
        "share of the variance",
        (
            Curve("variance_place", "by place"),
            Curve("variance_image", "by image"),
            Curve("variance_rest", "left over"),
        ),
    ),
    Spec(
        "Regulariser",
        "The term against collapse, before its weight.",
        "term",
        (Curve("regularizer", "regulariser"),),
    ),
)
REGIONS = (
    Spec(
        "Regions of an image",
        "How many regions an image is cut into, the left-over one included.",
        "regions",
        (Curve("regions", "regions"),),
    ),
    Spec(
        "Prediction steps of an image",
        "One fewer than regions where they are ranked, the number of targets where blocks are "
        "random.",
        "steps",
        (Curve("steps_per_image", "steps"),),
    ),
    Spec(
        "Images on ranked regions",
        "λ is the planned share. An image without a region takes random blocks.",
        "share of images",
        (
            Curve("ranked_share", "ranked"),
            Curve("lambda", "λ"),
            Curve("empty_share", "without a region"),
        ),
    ),
    Spec(
        "Saliency and regions on the objects",
        "Read on a held-out part whose object masks are known. AUC: how well saliency tells object "
        "patches from others, 50 by chance. Pointing: how often its highest patch lies on an "
        "object. Best IoU: of the region that covers the main object best.",
        "%",
        (
            Curve("probe_auc", "AUC"),
            Curve("probe_pointing", "pointing"),
            Curve("probe_best_iou", "best IoU"),
        ),
    ),
)
SCHEDULE = (
    Spec("Learning rate", "Of AdamW.", "rate", (Curve("lr", "learning rate"),)),
    Spec(
        "Target momentum",
        "Of the moving average that the target encoder is.",
        "momentum",
        (Curve("momentum", "momentum"),),
    ),
    Spec(
        "Throughput",
        "Images trained on in a second.",
        "images/s",
        (Curve("images_per_s", "throughput"),),
    ),
    Spec(
        "Waiting for data",
        "Share of the time in which the loader was waited for.",
        "share of time",
        (Curve("data_wait_share", "waiting"),),
    ),
)


def groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The charts of some runs, in groups with a title; charts without a value are left out."""
    titled = (
        ("Learning", LEARNING, False),
        ("Health", HEALTH, False),
        ("Regions", REGIONS, False),
        ("Schedule and speed", SCHEDULE, True),
    )
    found = []
    for title, specs, folded in titled:
        charts = [_chart(spec, runs) for spec in specs]
        if title == "Learning":
            charts[2:2] = [_by_step(group, len(runs) > 1) for group in alike(runs)]
        charts = [chart for chart in charts if chart["series"]]
        if charts:
            found.append({"title": title, "folded": folded, "charts": charts})
    return found


def interval_chart(task: str, metric: str, scores: Sequence[tuple[str, Score]]) -> dict[str, Any]:
    """Values with their intervals, a line each; `scores` holds (run, score)."""
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


def _chart(spec: Spec, runs: Sequence[Run]) -> dict[str, Any]:
    if len(runs) > 1:
        series = [
            _series(group_name(group), group, spec.curves[0].key, runs.index(group[0]))
            for group in alike(runs)
        ]
    else:
        series = [_series(c.label, runs, c.key, colour) for colour, c in enumerate(spec.curves)]
    meaning = spec.meaning
    if len(runs) > 1 and len(spec.curves) > 1:
        meaning += f" Drawn: {spec.curves[0].label}."
    if len({run.config.method.name for run in runs}) > 1 and spec.unit == "loss":
        meaning += " Methods predict different patches: their losses are not comparable."
    if any("low" in item for item in series):
        meaning += " A band reaches from the lowest to the highest seed."
    return {
        "title": spec.title,
        "meaning": meaning,
        "unit": spec.unit,
        "series": [item for item in series if item["x"]],
    }


def _by_step(group: Sequence[Run], named: bool) -> dict[str, Any]:
    """The loss of each prediction step; step k predicts region k + 1 from the regions before."""
    logged = {key for run in group for line in run.steps for key in line}
    numbers = takewhile(lambda k: step_loss(k) in logged, count(1))
    series = [_series(f"step {k}", group, step_loss(k), k - 1) for k in numbers]
    title = "Loss by prediction step"
    return {
        "title": f"{title}: {group_name(group)}" if named else title,
        "meaning": "Smooth-L1 of each step of the sequence. Later steps see more of the image.",
        "unit": "loss",
        "series": [item for item in series if item["x"]],
    }


def _series(name: str, group: Sequence[Run], key: str, colour: int) -> dict[str, Any]:
    """The steps at which a value was logged, and the value; of several runs its mean, where all of
    them have one, and how far they are apart."""
    logged = [
        {int(line["step"]): line[key] for line in (*run.steps, *run.probes) if key in line}
        for run in group
    ]
    common = sorted(set.intersection(*(set(values) for values in logged)))
    steps = evenly(common, MOST_POINTS)
    rows = [[values[step] for values in logged] for step in steps]
    found = {"name": name, "colour": colour, "x": steps, "y": [mean(row) for row in rows]}
    if len(group) > 1:
        found |= {"low": [min(row) for row in rows], "high": [max(row) for row in rows]}
    return found
