"""`dseqjepa evaluate`: open backbone and data, call the task, write the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dseqjepa.config import Config, RuntimeConfig, flattened
from dseqjepa.console import LastingConsole
from dseqjepa.data.images import notes_of, range_of
from dseqjepa.data.labelled import check_size, open_splits, prepare
from dseqjepa.data.source import Source
from dseqjepa.errors import InputError, Stopped
from dseqjepa.files import check_writable, json_digest, remove
from dseqjepa.provenance import environment
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.backbone import Backbone, open_backbone
from dseqjepa.tasks.config import FrozenConfig, TaskConfig
from dseqjepa.tasks.reading import check_bad
from dseqjepa.tasks.results import (
    FORMAT,
    NOT_PER_CENT,
    Result,
    choose_path,
    differences,
    in_words,
    row,
    show,
    write_json,
)
from dseqjepa.tasks.saved import head_path, save_head
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.folder import is_in_use
from dseqjepa.train.runtime import Runtime, device_name, join
from dseqjepa.train.trained_on import trained_on

SCENES = 20_000
Draw = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Job:
    """The input of a task: the backbone, on its device, and the data."""

    backbone: Backbone
    train: Source
    test: Source
    folder: Path
    """Folder for data kept next to the result: features, training checkpoints."""
    device: torch.device
    ranks: Ranks
    console: Console
    """Silent on all ranks except rank 0."""
    name: str
    """Name of the result file, without its extension."""
    resume: bool = False
    overwrite: bool = False
    held: ExitStack = field(default_factory=ExitStack)
    """Locks held until the result is written."""
    told: set[str] = field(default_factory=set)
    """Bad images already reported."""

    def report_bad(
        self, bad: Mapping[str, str], count: int, max_bad: float, part: str = "training"
    ) -> None:
        """Report the undecodable images of a split, each once.

        Raises:
            RunError: they are more than `max_bad` of `count`.
        """
        for name, reason in bad.items():
            if name not in self.told:
                self.told.add(name)
                line = f"cannot decode {name}: {reason}"
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        check_bad(bad, count, max_bad, part)


def run_task(
    task: str,
    spec: str,
    config: TaskConfig,
    *,
    data: str | None,
    out: Path | None,
    resume: bool = False,
    overwrite: bool = False,
    draw: Draw | None = None,
) -> Path:
    """Evaluate on all ranks, print a table, write JSON; the file that was written.

    Args:
        task: a name in `TASKS`, matching the config.
        spec: as for `open_backbone`.
        data: as for `open_source`; by default the run's training data.
        out: the file; by default `evaluations/TASK.json` next to the run's checkpoints.
        resume, overwrite: for a task that trains, what to do with an earlier training.
        draw: draws the task's examples next to the file.

    Raises:
        InputError: before anything is written.
    """
    began = time.perf_counter()
    words = {**flattened(config.model_dump(mode="json")), "evaluation": task, "out": str(out)}
    alike = {key: value for key, value in words.items() if key != "workers"}
    runtime = join(RuntimeConfig(accelerator=config.accelerator), alike)
    ranks, evaluate = runtime.ranks, import_module(f"dseqjepa.tasks.{task}").evaluate
    job, source = ranks.together(lambda: _open_job(task, spec, config, data, out, runtime))
    job = replace(job, resume=resume, overwrite=overwrite)
    fingerprints = {"train": job.train.fingerprint(), "test": job.test.fingerprint()}
    who = identity(job.backbone)  # before it is trained
    ranks.check_alike(weights=who["digest"], **fingerprints, resume=resume, overwrite=overwrite)
    with job.held:
        with ranks.failing_together(Stopped):
            if isinstance(config, FrozenConfig):
                from dseqjepa.tasks.baselines import beside

                result: Result = beside(job, config, evaluate)
            else:
                result = evaluate(job, config)
        values = describe(task, job, config, result, source, who, fingerprints)
        values["wall_s"] = round(time.perf_counter() - began, 3)
        path = out or choose_path(job.folder, task, values)
        if ranks.first:
            values["warnings"] = _changed(job, fingerprints)
            _publish(job, config, result, values, path, draw)
            if result.head is not None:
                _save_head(task, job, config, result, who["digest"], head_path(path))
    if ranks.first:  # without a lock: a network file system keeps files that are open
        for rest in result.unfinished:
            if not is_in_use(rest):
                remove(rest)
    ranks.close()
    return path


def _open_job(
    task: str, spec: str, config: TaskConfig, data: str | None, out: Path | None, runtime: Runtime
) -> tuple[Job, str]:
    """Backbone and data, and the `data=` value for that data; `InputError` as in `run_task`."""
    # Third-party names may look like markup.
    console = LastingConsole(quiet=not runtime.ranks.first, markup=False)
    if out is not None and out.is_dir():
        raise InputError(f"out={out} is a folder: give a file, such as {out / f'{task}.json'}")
    backbone = open_backbone(
        spec,
        weights=config.weights,
        pretrained=config.pretrained,
        image_size=None if config.image_size == "auto" else config.image_size,
        seed=config.init_seed,
        trainable=config.trains_backbone,
    )
    if out is None and backbone.run is None:
        raise InputError(f"out=FILE.json is missing: {spec} is not a run with a folder for results")
    folder = out.parent if out is not None else Path(backbone.run or "") / "evaluations"
    check_writable(folder, f"out={out or folder}")
    if data is None:
        if backbone.config is None:
            raise InputError(f"data=PATH is missing: {spec} does not record what it was trained on")
        data = trained_on(open_checkpoint(Path(backbone.source)))
    if config.size != "auto":
        check_size(data)
    train, test = open_splits(
        data,
        size=_scenes(config, backbone.config),
        image_size=backbone.image_size,
        seed=config.data_seed,
        pixel_range=backbone.pixel_range(config.pixel_range),
    )
    for note in notes_of(train, test):
        console.print(note, highlight=False, soft_wrap=True)
    if config.reads_training:
        for part in (train, test):
            prepare(part)
    name, device = task if out is None else out.stem, runtime.fabric.device
    return Job(backbone.to(device), train, test, folder, device, runtime.ranks, console, name), data


def _publish(
    job: Job,
    config: TaskConfig,
    result: Result,
    values: Mapping[str, Any],
    path: Path,
    draw: Draw | None,
) -> None:
    """Write the file and the picture, and show the table."""
    write_json(path, values)
    quick = ", preset=quick" if config.preset == "quick" else ""
    title = f"{values['title']}{quick} (95 % interval: {result.interval})"
    job.console.print(show(values["results"], title))
    paired = in_words(values["differences"], job.backbone.name)
    for line in (*paired, *_missing(result), *values["warnings"]):
        job.console.print(line, markup=False, highlight=False, soft_wrap=True)
    print(f"written: {path}")
    if draw is not None and result.examples:
        draw(path.with_suffix(".png"), **result.examples)
        print(f"written: {path.with_suffix('.png')}")


def _save_head(
    task: str, job: Job, config: TaskConfig, result: Result, digest: str, path: Path
) -> None:
    save_head(
        path,
        result.head,
        task=task,
        labels=result.labels,
        classes=job.train.classes[result.labels],
        backbone=job.backbone,
        digest=digest,
        pixel_range=range_of(job.train),
        precision=config.precision,
    )
    print(f"written: {path}")


def describe(
    task: str,
    job: Job,
    config: TaskConfig,
    result: Result,
    source: str,
    who: Mapping[str, Any],
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """The content of a result's JSON except the time; `who` is the `identity`, and the
    fingerprints are those of the data before it was read."""
    backbone = job.backbone
    protocol = {
        "task": task,
        "labels": result.labels,
        "preset": config.preset,
        **result.protocol,
        "precision": config.precision,
        "data": fingerprints,
    }
    # Metrics may already be named by their labels, as in Clevr.
    is_plain = result.labels in ("class", "pixels", "+".join(result.metrics))
    name = task if is_plain else f"{task} {result.labels}"
    name = result.labels if task == "knn" else name
    rows = [row(floor, name, metrics) for floor, metrics in result.floors.items()]
    for encoder, found in (*result.others.items(), (backbone.name, result)):
        counts = {key: getattr(found, key) for key in ("n_train", "n_test", "n_bad")}
        rows.append(row(encoder, name, found.metrics, layers=found.layers, **counts))
    return {
        "format": FORMAT,
        "task": task,
        "title": f"{config.title}, {result.labels}, %"
        + (" (RMSE in the data's unit)" if NOT_PER_CENT.keys() & result.metrics.keys() else ""),
        "preset": config.preset,
        "metrics": {key: metric._asdict() for key, metric in result.metrics.items()},
        "interval": result.interval,
        "n_train": result.n_train,
        "n_test": result.n_test,
        "n_bad": result.n_bad,
        "missing": result.missing,
        "seeds": list(result.seeds),
        "backbone": {
            **who,
            "layers": result.layers,
            "pooling": result.pooling,
        },
        "data": {
            "source": source,
            **fingerprints,
            "left_out": list(notes_of(job.train, job.test)),
        },
        "protocol": protocol,
        "config": config.model_dump(mode="json"),
        "details": dict(result.details),
        "results": rows,
        "differences": differences(result, result.others),
        "device": device_name(job.device),
        "ranks": job.ranks.world,
        **environment(),
    }


def _missing(result: Result) -> list[str]:
    """Which classes lack images, in words."""
    return [
        f"{part} images that cannot be decoded: "
        + ", ".join(f"{gone} of {count} of {name}" for name, (gone, count) in classes.items())
        for part, classes in result.missing.items()
        if classes
    ]


def _changed(job: Job, fingerprints: Mapping[str, str]) -> list[str]:
    """A description of how the data changed since the evaluation began."""
    lines = []
    for part, source in (("train", job.train), ("test", job.test)):
        try:
            is_same = source.fingerprint() == fingerprints[part]
            why = ""
        except InputError as error:
            is_same, why = False, f": {error}"
        if not is_same:
            lines.append(f"warning: the {part} images changed during the evaluation{why}")
    return lines


def identity(backbone: Backbone) -> dict[str, Any]:
    """Identity of the encoder. Runs that differ only in their seed have the same `group`."""
    kind: dict[str, Any] = {"name": backbone.name, "weights": backbone.weights}
    if backbone.seed is None:
        kind["digest"] = backbone.digest()
    elif backbone.config is not None:
        kind["config"] = _without_seed(backbone.config)
    settings = kind.get("config")
    height, width = backbone.image_size
    return {
        "name": backbone.name,
        "weights": backbone.weights,
        "source": backbone.source,
        "digest": backbone.digest(),
        "group": json_digest({**kind, "image_size": [height, width]})[:16],
        "seed": backbone.seed,
        "settings": None if settings is None else flattened(settings),
        "image_size": [height, width],
        "patch_size": backbone.patch_size,
        "width": backbone.width,
        "depth": backbone.depth,
    }


def _without_seed(config: Config) -> Mapping[str, Any]:
    """The settings of pre-training that determine the weights, except the seed."""
    values = config.model_dump(mode="json")
    values["runtime"] = {"precision": values["runtime"]["precision"]}
    for section in ("log", "checkpoint", "probe"):
        del values[section]
    for key in ("source", "workers", "cache"):  # the same data may be elsewhere
        del values["data"][key]
    return values


def _scenes(config: TaskConfig, trained: Config | None) -> int:
    if config.size != "auto":
        return config.size
    return SCENES if trained is None else trained.data.size
