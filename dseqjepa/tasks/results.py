"""What an evaluation found, on disk: a JSON file with all that is needed to trust its numbers.

`protocol` holds what must be equal for two numbers to stand in one column. The rest says who was
measured (`backbone`), on what (`data`), how it was set (`config`) and where it ran.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor

from dseqjepa.errors import InputError, printable
from dseqjepa.files import write_whole

FORMAT = 1
MANY = 4
"""The most metrics that stand side by side on a terminal."""


class Metric(NamedTuple):
    """A number with its 95 % interval; both ends None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """What a task returns; `save` adds the rest.

    `labels` is what was predicted ("class", ...), `protocol` what of the task must be equal for two
    results to be comparable, `interval` what the metrics' intervals are over. `rows` are what
    others (raw pixels, ...) got under the same protocol, in the form of `row`.
    """

    metrics: Mapping[str, Metric]
    protocol: Mapping[str, Any]
    labels: str
    layers: str
    """Which blocks were read, as a person says it."""
    pooling: str
    n_train: int
    n_test: int
    n_bad: int
    interval: str = "bootstrap over test images"
    seeds: Sequence[int] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    others: Sequence[Mapping[str, Any]] = ()
    examples: Mapping[str, Any] = field(default_factory=dict)
    """What a picture of the result is drawn of."""
    unfinished: Path | None = None
    """A file that the evaluation would go on from: of no more use when the result is written."""


def row(encoder: str, task: str, metrics: Mapping[str, Metric], **details: Any) -> dict[str, Any]:
    """One encoder's numbers, flat: `X`, `X_low` and `X_high`."""
    flat: dict[str, Any] = {"encoder": encoder, "task": task}
    for name, metric in metrics.items():
        flat |= {name: metric.value, f"{name}_low": metric.low, f"{name}_high": metric.high}
    return flat | details


def accuracy_metric(correct_N: Bool[Tensor, " N"]) -> Metric:
    """Share of correct images in per cent, with its 95 % bootstrap interval.

    The number of correct images in a resample is binomial, so the percentiles that resampling
    would approach are read off its distribution.
    """
    count, share = len(correct_N), correct_N.double().mean().item()
    low, high = stats.binom.ppf([0.025, 0.975], count, share)
    return Metric(100 * share, 100 * float(low) / count, 100 * float(high) / count)


def mean_metric(values: Sequence[float]) -> Metric:
    """Mean over draws or seeds with its 95 % interval by Student's t; no interval of one alone."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Metric(mean)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Metric(mean, mean - half, mean + half)


def digest(values: Mapping[str, Any]) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def choose_path(folder: Path, task: str, values: Mapping[str, Any]) -> Path:
    """`folder`/TASK.json; another name where that holds what this result does not replace: one of
    another protocol, other weights, or another image size."""
    path = folder / f"{task}.json"
    if path.is_file():
        try:
            other = _kind(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, RecursionError):
            return path  # not ours, or of an older version
        if other != _kind(values):
            path = folder / f"{task}-{_kind(values)[:8]}.json"
    return path


def _kind(values: Mapping[str, Any]) -> str:
    backbone = values["backbone"]
    return digest(
        {
            "protocol": values["protocol"],
            **{key: backbone[key] for key in ("weights", "digest", "image_size")},
        }
    )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(values, indent=1) + "\n")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def show(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Rows as people read them: one line an encoder, one column a task and metric; the other way
    round where there are many metrics."""
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
    if len(metrics) <= MANY:
        for heading in map(_cell_of, ("features of", *names)):
            table.add_column(heading, justify="right" if table.columns else "left")
        for encoder, line in zip(encoders, cells, strict=True):
            table.add_row(_cell_of(encoder), *line)
    else:
        for heading in map(_cell_of, ("", *encoders)):
            table.add_column(heading, justify="right" if table.columns else "left")
        for name, across in zip(names, zip(*cells, strict=True), strict=True):
            table.add_row(_cell_of(name), *across)
    return table


def _cell_of(name: str) -> Text:
    """A name that others chose, which may look like rich's markup."""
    return Text(printable(name))


def _cell(rows: Sequence[Mapping[str, Any]], encoder: str, task: str, metric: str) -> str:
    for r in rows:
        if (r["encoder"], r["task"]) == (encoder, task) and metric in r:
            return text(Metric(r[metric], r[f"{metric}_low"], r[f"{metric}_high"]))
    return ""


def text(metric: Metric) -> str:
    """`73.5 (72.9 - 74.1)`"""
    if metric.low is None or metric.high is None:
        return f"{metric.value:.1f}"
    return f"{metric.value:.1f} ({metric.low:.1f} - {metric.high:.1f})"
