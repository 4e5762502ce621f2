"""The sentences of a report: what a run was, whether it is healthy, what it learnt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from statistics import mean, stdev
from typing import Any, Literal

from dseqjepa.config import Config, differences
from dseqjepa.data.scenes import SPECS
from dseqjepa.errors import printable
from dseqjepa.presets import preset, preset_names
from dseqjepa.report.run import PairedDifference, Run, Score
from dseqjepa.train import monitor

NO_ENCODER = ("majority", "place alone", "raw pixels")
"""Rows of an evaluation without an encoder."""
CONTROL, TRAINED = "regularizer", "trained"
"""Rows of the demo: the encoder trained without the prediction loss, and the run's own."""
NAMES = {
    "untrained": "the untrained encoder",
    "majority": "the majority class",
    CONTROL: "the regularizer alone",
    TRAINED: "the trained encoder",
}
Tone = Literal["good", "unsure", "bad", "none"]
NEEDED = {"step", "lr", "feature_std", "cosine", "rank_me"}
"""The fields of a log line that the monitor needs."""


@dataclass(frozen=True)
class HealthSummary:
    """The health monitor's judgement of the last logged step."""

    tone: Tone
    sentence: str
    figures: str
    more: str
    """What the verdict means, and earlier worse verdicts."""


def method_name(config: Config) -> str:
    return config.method.title


def backbone_name(config: Config) -> str:
    return f"{config.model.name.replace('vit_', 'ViT-')}/{config.model.patch_size}"


def what_it_was(run: Run) -> str:
    """The run in one or two sentences."""
    config = run.config
    height, width = config.data.image_size
    done = int(run.steps[-1]["step"]) if run.steps else 0
    total = run.total_steps
    length = f"{done:,} steps"
    if total is not None and done >= total:
        length = f"all {total:,} steps ({config.optim.epochs} epochs)"
    elif total is not None:
        length = f"{done:,} of {total:,} steps ({100 * done / total:.0f} %)"
    text = (
        f"{method_name(config)} with a {backbone_name(config)} encoder at {width} × {height} px, "
        f"trained without labels on {printable(config.data.source)}: {length} of "
        f"{config.data.batch_size} images, {done * config.data.batch_size:,} image views"
    )
    seconds = sum(line.get("seconds", 0) for line in run.steps)
    return f"{text}, in {duration(seconds)}." if seconds else f"{text}."


def verdict(run: Run) -> HealthSummary:
    """The monitor's verdict at the last logged step, and any earlier one that differed."""
    judged = list(monitor.verdicts(line for line in run.steps if line.keys() >= NEEDED).items())
    if not judged:
        return HealthSummary("none", "No health metrics were logged.", "", "")
    sentence, _, figures = str(judged[-1][1]).partition(" [")
    tone = _tone(judged[-1][1])
    spans = [
        (key, [step for step, _ in group])
        for key, group in groupby(judged, key=lambda item: _tone(item[1]))
    ]
    more = ""
    if tone == "good":
        predicts = ", and better than predicting the mean target" * ("skill" in run.steps[-1])
        more = f"No sign of collapse{predicts}."
    if tone == "bad":
        more = f"This has been the verdict since step {spans[-1][1][0]:,}."
    elif bad := [_span(steps) for key, steps in spans if key == "bad"]:
        more += f" There was an alarm earlier, at {_listing(bad)}."
    return HealthSummary(
        tone, sentence[:1].upper() + sentence[1:] + ".", figures.rstrip("]"), more.strip()
    )


def what_it_learnt(run: Run) -> list[str]:
    """A sentence per evaluated encoder and task, and one for the probe."""
    scores = [score for evaluation in run.evaluations for score in evaluation.scores]
    by_task: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        by_task.setdefault((score.task, score.metric), []).append(score)
    sentences = []
    for (task, _), rows in by_task.items():
        others = [row for row in rows if _role(row) != "trained"]
        sentences += [_compare(task, row, others) for row in rows if _role(row) == "trained"]
    if trend := _trend(run, "probe_knn"):
        sentences.append(f"The kNN probe on training images {trend}: a trend, not an accuracy.")
    if trend := _trend(run, "probe_pointing"):
        sentences.append(f"The share of images whose most salient patch lies on an object {trend}.")
    if not scores:
        sentences.append("It has not been evaluated yet: run dseqjepa evaluate knn RUN.")
    return sentences


def _trend(run: Run, key: str) -> str:
    """The course of an online metric in words; "" without any."""
    lines = [line for line in run.probes if key in line]
    if not lines:
        return ""
    last = f"{lines[-1][key]:.1f} % at step {int(lines[-1]['step']):,}"
    if len(lines) == 1:
        return f"was {last}"
    return f"went from {lines[0][key]:.1f} % at step {int(lines[0]['step']):,} to {last}"


def nearest_preset(config: Config) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The preset of the same method that differs in the fewest values, and these values.

    A run's config names no preset. The path of the data is ignored; ties go to the same encoder,
    then to the order of `dseqjepa presets`.
    """
    found = []
    for name, candidate in _presets().items():
        if candidate.method.name == config.method.name:
            changed = differences(candidate, config)
            changed.pop("data.source", None)
            if config.data.source not in SPECS:
                changed.pop("data.size", None)  # nothing reads it
            found.append((len(changed), candidate.model != config.model, name, changed))
    _, _, name, changed = min(found, key=lambda item: item[:2])
    return name, changed


@cache
def _presets() -> dict[str, Config]:
    return {name: preset(name) for name in preset_names()}


def config_table(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Dotted key -> the runs' values, for every setting in which two differ; None if a method has
    no such setting."""
    rows: dict[str, list[Any]] = {}
    for index, run in enumerate(runs[1:], start=1):
        for key, (first, other) in differences(runs[0].config, run.config).items():
            rows.setdefault(key, [first] * len(runs))[index] = other
    rows.pop("method.name", None)  # shown by its name
    return list(rows.items())


def alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs that differ only in their seed."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            changed = differences(group[0].config, run.config).keys()
            seeds = {other.config.runtime.seed for other in group}
            if changed == {"runtime.seed"} and run.config.runtime.seed not in seeds:
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def group_name(group: Sequence[Run]) -> str:
    """The label of a line drawn for several runs."""
    if len(group) == 1:
        return group[0].name
    rest = group[1].name if len(group) == 2 else f"{len(group) - 1} more"
    return f"mean of {group[0].name} and {rest}"


def spread(values: Sequence[float], form: str) -> str:
    """One value, or the mean of several with the lowest and the highest; a dash for none."""
    if not values:
        return "–"
    shown = list(map(form.format, values))
    if len(set(shown)) == 1:
        return shown[0]
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def pooled(scores: Sequence[Score]) -> Score:
    """One score for several runs that differ in their seed: mean, lowest and highest."""
    if len(scores) == 1:
        return scores[0]
    values = [score.value for score in scores]
    details = set.intersection(*(set(score.details.items()) for score in scores))
    kept = {key: value for key, value in scores[0].details.items() if (key, value) in details}
    return replace(scores[0], value=mean(values), low=min(values), high=max(values), details=kept)


def over_seeds(runs: Sequence[Run]) -> list[str]:
    """Mean and standard deviation of scores, for runs that differ only in the seed."""
    sentences = []
    for group in alike(runs):
        if len(group) < 2:
            continue
        for (task, metric), scores in trained_scores(group).items():
            values = [score.value for score in scores.values()]
            if len(values) == len(group):
                sentences.append(
                    f"{method_name(group[0].config)} over {len(group)} seeds ("
                    f"{_listing([run.name for run in group])}): task {task}, {metric} "
                    f"{mean(values):.1f} ± {stdev(values):.1f} (mean and standard deviation)."
                )
    return sentences


def trained_scores(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, Score]]:
    """(task, metric) -> run -> the score of its trained encoder, the last one if there are more."""
    found: dict[tuple[str, str], dict[str, Score]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            for score in evaluation.scores:
                if _role(score) == "trained":
                    found.setdefault((score.task, score.metric), {})[run.name] = score
    return found


def duration(seconds: float) -> str:
    """A duration in a suitable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def interval(score: Score) -> str:
    """`16.4 (14.8 to 18.1)`; accuracies are in per cent."""
    form = _form(score)
    if score.low is None or score.high is None:
        return form.format(score.value)
    return f"{form.format(score.value)} ({form.format(score.low)} to {form.format(score.high)})"


def _form(score: Score) -> str:
    """One decimal, or two of an error in the data's unit, which may be small."""
    return "{:.2f}" if score.metric.endswith("rmse") else "{:.1f}"


def details(items: Iterable[tuple[str, str]]) -> str:
    """How something was measured: `k 20, n_test 2000`."""
    return ", ".join(f"{key} {value}" for key, value in items)


def _role(score: Score) -> str:
    if score.encoder in (*NO_ENCODER, CONTROL) or score.encoder.startswith("untrained"):
        return score.encoder.replace(" encoder", "")
    return "trained"


def _compare(task: str, row: Score, others: Iterable[Score]) -> str:
    unit = " %" if row.metric == "accuracy" else ""
    parts = []
    for other in others:
        name = NAMES.get(_role(other), other.encoder)
        gap = row.minus.get(other.encoder)
        paired = f", {_signed(gap, _form(row))} on the same images" if gap else ""
        value = _form(row).format(other.value)
        parts.append(f"{_relation(row, other)} {name} ({value}{unit}{paired})")
    value, bounds = _form(row).format(row.value), ""
    if row.low is not None and row.high is not None:
        low, high = map(_form(row).format, (row.low, row.high))
        bounds = f" (95 % interval {low} to {high})"
    measured = f"{row.metric} {value}{unit}{bounds}"
    beside = f": {_listing(parts)}" if parts else ""
    return f"Task {task}: {measured} with {NAMES.get(row.encoder, row.encoder)}{beside}."


def _relation(row: Score, other: Score) -> str:
    """Compare two values, by the interval of their paired difference if it is known. Otherwise
    values are clearly apart if their own intervals are, which is stricter."""
    if gap := row.minus.get(other.encoder):
        if gap.low > 0:
            return "clearly above"
        return "clearly below" if gap.high < 0 else "not clearly apart from"
    bounds = (row.low, row.high, other.low, other.high)
    if None in bounds:
        return "above" if row.value > other.value else "not above"
    if row.low > other.high:  # type: ignore[operator]
        return "clearly above"
    if row.high < other.low:  # type: ignore[operator]
        return "clearly below"
    return "not clearly apart from"


def _signed(gap: PairedDifference, form: str) -> str:
    """`+2.1 (+0.4 to +3.8)`."""
    value, low, high = (form.replace(":", ":+").format(number) for number in gap)
    return f"{value} ({low} to {high})"


def _tone(found: monitor.Verdict) -> Tone:
    if found.alarm:
        return "bad"
    return "good" if found.state == "healthy" else "unsure"


def _span(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]:,}"
    return f"steps {steps[0]:,} to {steps[-1]:,}"


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def shown(value: Any) -> str:
    """A config value as typed on the command line."""
    if value is None:
        return "–"
    if isinstance(value, Mapping | list | tuple):
        return printable(", ".join(map(str, value)))
    return printable(str(value).lower() if isinstance(value, bool) else value)
