"""The input of a report: the files of a run's folder, checked.

Reports also cover failed runs: damaged parts are left out and noted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dseqjepa.config import Config
from dseqjepa.errors import InputError, printable
from dseqjepa.files import json_digest
from dseqjepa.presets import load_config
from dseqjepa.train.metrics import is_step, read_metrics

Line = Mapping[str, float]
"""The finite numbers of a line of metrics.jsonl by name; `loss_by_step` uses `step_loss` names."""


class PairedDifference(NamedTuple):
    """A paired difference with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One value of an evaluation with its interval."""

    task: str
    encoder: str
    metric: str
    value: float
    low: float | None
    high: float | None
    details: Mapping[str, str]
    """Other fields of the row, such as the number of test images."""
    minus: Mapping[str, PairedDifference] = field(default_factory=dict)
    """The value less that of each other encoder, on the same test images."""


@dataclass(frozen=True)
class Evaluation:
    file: str
    data: str
    """Where the images came from, and whether the preset was not the full one."""
    scores: Sequence[Score]
    protocol: str = ""
    """`protocol_digest`: equal if scores are comparable; the images are part of it."""


@dataclass(frozen=True)
class Run:
    """A run, read from its folder."""

    path: Path
    name: str
    """Its name, unique within a report."""
    config: Config
    steps: Sequence[Line]
    """The logged steps, in order."""
    probes: Sequence[Line]
    """The lines of the online evaluation: `step` and, depending on the data's labels, `probe_knn`
    and metrics such as `probe_auc`."""
    evaluations: Sequence[Evaluation]
    checkpoints: Sequence[Path]
    """Checkpoint folders, by step; not verified."""
    start: str
    """Origin of the initial weights from log.txt; "" if unknown."""
    total_steps: int | None
    """The planned number of steps; None if no checkpoint records it."""
    notes: Sequence[str] = field(default=())
    """What is damaged or missing, one sentence each."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run's folder.

    Raises:
        InputError: no path, a duplicate, or a folder that is not a run.
    """
    if not paths:
        raise InputError("expected a run's folder, found none")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"the run {path} is given twice")
        seen.add(path.resolve())
    return _told_apart(
        [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    )


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the data or the file in the name of a task that was measured by several
    protocols: nothing compares scores of different tasks."""
    ways: dict[str, dict[str, Evaluation]] = {}
    for each in (each for run in runs for each in run.evaluations):
        for score in each.scores:
            ways.setdefault(score.task, {}).setdefault(each.protocol, each)

    def named(score: Score, each: Evaluation) -> Score:
        others = ways[score.task]
        if len(others) == 1:
            return score
        first = others[each.protocol]
        shared = [other for other in others.values() if other.data == first.data]
        where = first.data if len(shared) == 1 else first.file
        return replace(score, task=f"{score.task} ({where})")

    return [
        replace(
            run,
            evaluations=[
                replace(each, scores=[named(score, each) for score in each.scores])
                for each in run.evaluations
            ],
        )
        for run in runs
    ]


def read_run(path: Path, name: str) -> Run:
    """Read one run's folder; `InputError` if it is not one."""
    _check_is_run(path)
    try:
        config = load_config(path / "config.yaml")
    except InputError as error:
        raise InputError(f"the config of the run {path}: {error}") from None
    lines, notes = _read_metrics(path / "metrics.jsonl")
    checkpoints = sorted(
        (folder for folder in (path / "checkpoints").glob("step-*") if folder.is_dir()),
        key=step_of,
    )
    evaluations, damaged = _read_evaluations(path / "evaluations")
    return Run(
        path=path,
        name=name,
        config=config,
        steps=[line for line in lines if "loss" in line],
        probes=[line for line in lines if any(key.startswith("probe_") for key in line)],
        evaluations=evaluations,
        checkpoints=checkpoints,
        start=_start(path / "log.txt"),
        total_steps=_total_steps(checkpoints),
        notes=[*notes, *damaged],
    )


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name; -1 if it has none."""
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def step_loss(number: int) -> str:
    """The name of the loss of prediction step `number`, from 1, in a `Line`."""
    return f"loss of step {number}"


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as needed to distinguish them."""
    resolved = [path.resolve().parts for path in paths]
    depth = 1
    while len({parts[-depth:] for parts in resolved}) < len(paths):
        depth += 1
    return [printable("/".join(parts[-depth:])) for parts in resolved]


def _check_is_run(path: Path) -> None:
    if (path / "config.yaml").is_file():
        return
    if path.exists() and not path.is_dir():
        raise InputError(f"expected a run's folder, found the file {path}")
    if not path.exists():
        raise InputError(f"no such run: {path}")
    inside = [entry for entry in sorted(path.iterdir()) if (entry / "config.yaml").is_file()]
    hint = f"; did you mean {inside[0]}?" if inside else ""
    raise InputError(f"{path} is not a run: it has no config.yaml{hint}")


def _read_metrics(path: Path) -> tuple[list[Line], list[str]]:
    if not path.is_file():
        return [], ["The run has no metrics.jsonl: nothing was logged yet."]
    values, damaged = read_metrics(path)
    lines = [_numbers(line) for line in values]
    if not damaged:
        return lines, []
    which = ", ".join(map(str, list(damaged)[:8])) + (", ..." if len(damaged) > 8 else "")
    many = f"{len(damaged)} lines of metrics.jsonl are" if len(damaged) > 1 else "A line is"
    return lines, [f"{many} damaged and left out (metrics.jsonl, line {which})."]


def _numbers(values: Mapping[str, Any]) -> Line:
    by_step = values.get("loss_by_step")
    losses = enumerate(by_step if isinstance(by_step, list) else (), start=1)
    values = {**values, **{step_loss(number): value for number, value in losses}}
    return {key: value for key, value in values.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    """A finite number; JSON integers that no float can represent do not count."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _read_evaluations(folder: Path) -> tuple[list[Evaluation], list[str]]:
    evaluations, notes = [], []
    for path in sorted(folder.glob("*.json")):
        name = printable(path.name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [row for row in content["results"] if isinstance(row, dict)]
            data = content.get("data") or {}
            source = printable(data.get("source", "")) if isinstance(data, dict) else ""
            quick = ", quick" if content.get("preset") == "quick" else ""
            protocol = protocol_digest(content.get("protocol") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            notes.append(f"The evaluation {name} cannot be read ({type(error).__name__}).")
            continue
        scores = [score for row in rows for score in _scores(row, default_task=path.stem)]
        owner, paired = _differences(content)
        scores = [
            replace(score, minus=paired.get(score.metric, {})) if score.encoder == owner else score
            for score in scores
        ]
        evaluations.append(Evaluation(name, f"{source}{quick}", scores, protocol))
    return evaluations, notes


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    """Digest of a result's protocol, without the seed of its heads: runs of several seeds may be
    evaluated with theirs."""
    return json_digest({key: value for key, value in protocol.items() if key != "seed"})


def _differences(content: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, PairedDifference]]]:
    """The evaluated encoder, and its paired differences by metric and encoder subtracted."""
    backbone, listed = content.get("backbone"), content.get("differences")
    found: dict[str, dict[str, PairedDifference]] = {}
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, dict) and all(map(_is_number, map(each.get, PairedDifference._fields))):
            gap = PairedDifference(*(float(each[name]) for name in PairedDifference._fields))
            by_metric = found.setdefault(printable(each.get("metric")), {})
            by_metric[printable(each.get("minus"))] = gap
    return printable(backbone.get("name") if isinstance(backbone, dict) else ""), found


def _scores(row: Mapping[str, Any], default_task: str) -> Iterable[Score]:
    """The values of a row that have an interval; the rest says how they were measured.

    `X` is a value if there is `X_low`, as in all evaluations; a row without one is shown by its
    `accuracy`, if any.
    """
    measured = [key for key in row if f"{key}_low" in row] or ["accuracy"]
    bounds = {f"{key}_{end}" for key in measured for end in ("low", "high")}
    details = {
        printable(key): printable(f"{value:g}" if isinstance(value, float) else value)
        for key, value in row.items()
        if key not in {"encoder", "task", *measured, *bounds}
    }
    for key in measured:
        if _is_number(row.get(key)):
            low, high = (row.get(f"{key}_{end}") for end in ("low", "high"))
            yield Score(
                task=printable(row.get("task", default_task)),
                encoder=printable(row.get("encoder", "encoder")),
                metric=printable(key),
                value=float(row[key]),
                low=float(low) if low is not None and _is_number(low) else None,
                high=float(high) if high is not None and _is_number(high) else None,
                details=details,
            )


def _start(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(errors="replace", encoding="utf-8") as file:
        starts = [line.strip()[7:] for line in file if line.startswith("start: ")]
    return printable(starts[-1]) if starts else ""


def _total_steps(checkpoints: Sequence[Path]) -> int | None:
    for folder in reversed(checkpoints):
        try:
            steps = json.loads((folder / "state.json").read_text(encoding="utf-8"))["steps"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # the lens says which checkpoint is damaged
        if is_step(steps):
            return steps
    return None
