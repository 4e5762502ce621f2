"""Results of evaluations: JSON files with everything needed to trust their numbers.

`protocol` contains everything that must be equal for two numbers to share a column. The rest
records the encoder (`backbone`), the data (`data`), the settings (`config`) and the environment.

Suffixes: N test images, M training images, C classes, R resamples, L draws of a training subset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from rich.table import Table
from rich.text import Text
from scipy import special
from torch import Tensor

from dseqjepa.errors import InputError, printable
from dseqjepa.files import json_digest, write_whole
from dseqjepa.tasks.bootstrap import RESAMPLES

FORMAT = 1
MANY = 4
"""Maximum number of metrics in one row on a terminal."""
MAJORITY = "majority"
"""The row for always predicting the most common training class."""
NOT_PER_CENT = {"depth_rmse": (0.0, math.inf)}
"""Metrics that are not in per cent, and their possible values."""


class Metric(NamedTuple):
    """A number with its 95 % interval; both ends are None without one."""

    value: float
    low: float | None = None
    high: float | None = None


def per_cent(share: float, ends: tuple[float, float]) -> Metric:
    """A metric from a share of 1 and the ends of its interval."""
    low, high = ends
    return Metric(100 * share, 100 * low, 100 * high)


@dataclass(frozen=True, eq=False)
class Result:
    """What a task returns; `describe` adds the rest.

    `labels` is what was predicted ("class", ...), `protocol` the task's part of what must be equal
    for two results to be comparable, `interval` what the metrics' intervals are over. `floors` are
    the metrics of predictions that ignore the image, by row name; `others` those of raw pixels and
    the untrained encoder under the same protocol. `correct` tells, for each metric that is an
    accuracy, which images were classified correctly (L, N).
    """

    metrics: Mapping[str, Metric]
    protocol: Mapping[str, Any]
    labels: str
    layers: str
    """Which blocks were read, in words."""
    pooling: str
    n_train: int
    n_test: int
    n_bad: int
    interval: str = "bootstrap over test images"
    seeds: Sequence[int] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    floors: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)
    others: Mapping[str, Result] = field(default_factory=dict)
    correct: Mapping[str, Tensor] = field(default_factory=dict)
    missing: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    """By split ("train", "test") and class: the number of undecodable images, and of all."""
    examples: Mapping[str, Any] = field(default_factory=dict)
    """Data for a picture of the result."""
    head: Any = None
    """The trained classifier (a `tasks.saved.SavedHead`), if any; of several draws, the first."""
    unfinished: Sequence[Path] = ()
    """Files and folders that the evaluation would resume from, obsolete once the result is
    written."""


def row(encoder: str, task: str, metrics: Mapping[str, Metric], **details: Any) -> dict[str, Any]:
    """One encoder's numbers, flat: `X`, `X_low` and `X_high`."""
    flat: dict[str, Any] = {"encoder": encoder, "task": task}
    for name, metric in metrics.items():
        flat |= {name: metric.value, f"{name}_low": metric.low, f"{name}_high": metric.high}
    return flat | details


def accuracy_metric(correct_N: Bool[Tensor, " N"]) -> Metric:
    """Share of correct images in per cent, with its 95 % bootstrap interval.

    The number of correct images in a resample is binomial, so the percentiles are computed exactly
    from its distribution.
    """
    count, share = len(correct_N), correct_N.double().mean().item()
    up_to = special.bdtr(np.arange(count + 1), count, share)  # scipy.stats takes a second to import
    low, high = np.searchsorted(up_to, [0.025, 0.975])
    return Metric(100 * share, 100 * float(low) / count, 100 * float(high) / count)


def differences(result: Result, others: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Every metric of `result` less that of each other one, paired over the same test images.

    A pair of which one lacks images, such as files that became unreadable in between, is left out.
    """
    return [
        {"minus": name, "metric": metric, **paired(correct_LN, other.correct[metric])._asdict()}
        for name, other in others.items()
        for metric, correct_LN in result.correct.items()
        if metric in other.correct and other.correct[metric].shape == correct_LN.shape
    ]


def paired(correct_LN: Bool[Tensor, "L N"], other_LN: Bool[Tensor, "L N"]) -> Metric:
    """Difference of two accuracies in percentage points, with its 95 % interval: over draws by
    Student's t if there are several, otherwise by bootstrap over the test images.

    The same images are resampled for both, so what makes an image hard for both cancels. Only
    images on which the two disagree matter, and their numbers in a resample are multinomial.
    """
    if len(correct_LN) > 1:
        shares_L = correct_LN.double().mean(dim=1) - other_LN.double().mean(dim=1)
        return mean_metric((100 * shares_L).tolist(), (-100.0, 100.0))
    (correct_N,), (other_N,) = correct_LN, other_LN
    count = len(correct_N)
    only = [int((a & ~b).sum()) for a, b in ((correct_N, other_N), (other_N, correct_N))]
    shares = [*(number / count for number in only), 1 - sum(only) / count]
    drawn_R3 = np.random.default_rng(0).multinomial(count, shares, RESAMPLES)
    difference_R = 100 * (drawn_R3[:, 0] - drawn_R3[:, 1]) / count
    low, high = np.quantile(difference_R, [0.025, 0.975])
    return Metric(100 * (only[0] - only[1]) / count, float(low), float(high))


def in_words(found: Sequence[Mapping[str, Any]], encoder: str) -> list[str]:
    """`differences` as lines of text, one for each encoder that was subtracted."""
    lines: dict[str, list[str]] = {}
    for each in found:
        ends = f"({each['low']:+.1f} to {each['high']:+.1f})"
        shown = f"{each['metric'].replace('_', ' ')} {each['value']:+.1f} {ends}"
        lines.setdefault(each["minus"], []).append(shown)
    return [
        f"{encoder} minus {name}, on the same images: {', '.join(shown)}"
        for name, shown in lines.items()
    ]


@dataclass(frozen=True, eq=False)
class Classified:
    """Metrics and details for the predicted classes of the test images."""

    task: str
    correct_N: Bool[Tensor, " N"]
    metrics: Mapping[str, Metric]
    """`accuracy`, and `balanced_accuracy`, the mean of the per-class accuracies."""
    floors: Mapping[str, Mapping[str, Metric]]
    details: Mapping[str, Any]
    examples: Mapping[str, Any]

    def result(
        self,
        details: Mapping[str, Any] = MappingProxyType({}),
        correct: Mapping[str, Bool[Tensor, " N"]] = MappingProxyType({}),
        **others: Any,
    ) -> Result:
        """A result from this and its other fields, with further details and accuracies."""
        further = {name: accuracy_metric(right_N) for name, right_N in correct.items()}
        every = {"accuracy": self.correct_N, **correct}
        return Result(
            metrics={**self.metrics, **further},
            details={**details, **self.details},
            correct={name: right_N[None] for name, right_N in every.items()},
            labels=self.task,
            n_test=len(self.correct_N),
            floors=self.floors,
            examples=self.examples,
            **others,
        )


def classified(
    predicted_N: Int64[Tensor, " N"],
    label_N: Int64[Tensor, " N"],
    label_M: Int64[Tensor, " M"],
    names: Sequence[str],
    task: str,
) -> Classified:
    """Metrics, per class and overall, and those of always predicting the most common class.

    Args:
        label_M: of the training images.
        names: of the classes; duplicates are distinguished by their numbers.
        task: name of the labels.
    """
    classes = len(names)
    if len(set(names)) < classes:
        names = [f"{number} {name}" for number, name in enumerate(names)]
    commonest = label_M.bincount(minlength=classes).argmax()
    # Pairs rather than a matrix: there may be ten thousand classes.
    pairs, counts = (label_N * classes + predicted_N).unique(return_counts=True)
    found: dict[str, dict[str, int]] = {}
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        found.setdefault(names[pair // classes], {})[names[pair % classes]] = count
    per_class = {}
    for true, said in found.items():
        images = sum(said.values())
        per_class[true] = {"accuracy": 100 * said.get(true, 0) / images, "n_test": images}
    correct_N = predicted_N == label_N
    return Classified(
        task=task,
        correct_N=correct_N,
        metrics=_accuracies(correct_N, label_N),
        floors={MAJORITY: _accuracies(label_N == commonest, label_N)},
        details={"per_class": per_class, "confusion": found},
        examples={"matrices": {task: (found, tuple(names))}},
    )


def _accuracies(correct_N: Bool[Tensor, " N"], label_N: Int64[Tensor, " N"]) -> dict[str, Metric]:
    true_C = label_N.bincount()
    right_C = label_N[correct_N].bincount(minlength=len(true_C))
    return {
        "accuracy": accuracy_metric(correct_N),
        "balanced_accuracy": _balanced(right_C, true_C),
    }


def _balanced(right_C: Int64[Tensor, " C"], true_C: Int64[Tensor, " C"]) -> Metric:
    """The mean accuracy over the classes that occur, with its interval over resampled test images:
    the numbers of right and wrong images per class in a resample are multinomial."""
    cells_2C = torch.stack([right_C, true_C - right_C]).double().numpy()
    shares = cells_2C.ravel() / cells_2C.sum()
    drawn_R2C = (
        np.random.default_rng(0)
        .multinomial(int(true_C.sum()), shares, RESAMPLES)
        .reshape(RESAMPLES, *cells_2C.shape)
    )

    def balanced(cells_R2C: np.ndarray) -> np.ndarray:
        total_RC = cells_R2C.sum(axis=1)
        share_RC = cells_R2C[:, 0] / np.maximum(total_RC, 1)
        return 100 * (share_RC.sum(axis=1) / (total_RC > 0).sum(axis=1))

    low, high = np.quantile(balanced(drawn_R2C), [0.025, 0.975])
    return Metric(float(balanced(cells_2C[None])[0]), float(low), float(high))


def limits_of(metric: str) -> tuple[float, float]:
    """The smallest and largest possible value of a metric."""
    return NOT_PER_CENT.get(metric, (0.0, 100.0))


def mean_metric(values: Sequence[float], limits: tuple[float, float] = (0.0, 100.0)) -> Metric:
    """Mean over draws or seeds with its 95 % interval by Student's t, clipped to the possible
    `limits`; a single value has no interval."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Metric(mean)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(special.stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)
    return Metric(mean, max(mean - half, limits[0]), min(mean + half, limits[1]))


def choose_path(folder: Path, task: str, values: Mapping[str, Any]) -> Path:
    """`folder`/TASK.json, or another name if that file is from another protocol, other weights or
    another image size, and must not be replaced."""
    path = folder / f"{task}.json"
    if path.is_file():
        try:
            other = _kind(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, RecursionError):
            return path  # not ours, or from an older version
        if other != _kind(values):
            path = folder / f"{task}-{_kind(values)[:8]}.json"
    return path


def _kind(values: Mapping[str, Any]) -> str:
    backbone = values["backbone"]
    return json_digest(
        {
            "protocol": values["protocol"],
            **{key: backbone[key] for key in ("weights", "digest", "image_size")},
        }
    )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(values, indent=1) + "\n")


def show(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A readable table: one row per encoder, one column per task and metric; transposed if there
    are many metrics."""
    table = Table(title=Text(printable(title)))
    metrics = list(
        dict.fromkeys((str(r["task"]), key) for r in rows for key in r if f"{key}_low" in r)
    )
    if not metrics:
        raise InputError("expected rows with metrics, found none")
    names = [
        task if metric == "accuracy" else f"{task} {metric}".replace("_", " ")
        for task, metric in metrics
    ]
    encoders = list(dict.fromkeys(str(r["encoder"]) for r in rows))
    cells = [[_cell(rows, encoder, *pair) for pair in metrics] for encoder in encoders]
    corner, headings, starts = "features of", names, encoders
    if len(metrics) > MANY:
        corner, headings, starts = "", encoders, names
        cells = [list(column) for column in zip(*cells, strict=True)]
    for heading in (corner, *headings):
        table.add_column(_cell_of(heading), justify="right" if table.columns else "left")
    for start, line in zip(starts, cells, strict=True):
        table.add_row(_cell_of(start), *line)
    return table


def _cell_of(name: str) -> Text:
    """Escape a third-party name, which may look like rich's markup."""
    return Text(printable(name))


def _cell(rows: Sequence[Mapping[str, Any]], encoder: str, task: str, metric: str) -> str:
    for r in rows:
        if (r["encoder"], r["task"]) == (encoder, task) and metric in r:
            return text(Metric(r[metric], r[f"{metric}_low"], r[f"{metric}_high"]), metric)
    return ""


def text(metric: Metric, name: str = "accuracy") -> str:
    """`73.5 (72.9 - 74.1)`; values not in per cent get one more digit."""
    digits = 2 if name in NOT_PER_CENT else 1
    if metric.low is None or metric.high is None:
        return f"{metric.value:.{digits}f}"
    return f"{metric.value:.{digits}f} ({metric.low:.{digits}f} - {metric.high:.{digits}f})"
