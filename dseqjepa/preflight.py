"""`dseqjepa preflight`: the cost of a run on this machine, and an audit of its data.

Only the requested files are written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dseqjepa.config import Config
from dseqjepa.data.audit import Audit, audit
from dseqjepa.data.labelled import prepare
from dseqjepa.data.loader import Loader
from dseqjepa.data.source import Source
from dseqjepa.errors import printable
from dseqjepa.files import check_file, replacing, write_whole
from dseqjepa.methods import build_method
from dseqjepa.train.budget import within_minutes
from dseqjepa.train.checkpoint import Checkpoint, load_encoders
from dseqjepa.train.pretrain import fitting, open_training_source, starting_weights
from dseqjepa.train.rehearsal import Pace, Rehearsal, rehearse
from dseqjepa.train.runtime import connect, on_this_machine
from dseqjepa.train.trained_on import crops_of
from dseqjepa.viz.regions import regions_picture

PICTURES = 12
WAITING = 0.1
"""Share of a step spent waiting for data above which a warning is given."""
NOTICEABLY = 1.1
"""Ratio of speeds above which another precision is recommended."""
DUPLICATES = 0.01


def preflight(
    config: Config,
    *,
    init_from: Path | None = None,
    out: Path | None = None,
    report: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Audit the data, time some steps and print costs and warnings; returns them as plain values.

    Args:
        init_from: the run or checkpoint that the run will start from.
        out: a PNG for some images with their saliency and regions.
        report: a JSON file for the returned values.

    Raises:
        InputError: anything that `dseqjepa pretrain` would refuse, and files that cannot be
            written.
    """
    for file in filter(None, (out, report)):
        check_file(file)
    config = on_this_machine(config)
    connect(config.with_(runtime={"devices": 1}))  # fails if there is no such device
    source = open_training_source(config)
    is_timed, config = config.optim.is_timed, fitting(config, source)
    weights = starting_weights(config, init_from)
    console = console or Console()
    with console.status("auditing the data"):
        prepare(source)
        data = audit(source, config.data.image_size, seed=config.runtime.seed)
    console.print(data_table(config, data))
    chosen = []
    with console.status("rehearsing") as status:

        def tell(phase: str) -> None:
            status.update(f"rehearsing: {phase}")
            if not console.is_terminal:
                console.print(f"rehearsing: {phase}")

        pace = rehearse(config, source, weights, tell)
    if is_timed:
        config, line = within_minutes(config, pace.epoch_times(config))
        assert config.optim.epochs != "auto"
        chosen, pace = [line], pace.of_epochs(config.optim.epochs)
    console.print(cost_table(config, pace))
    warnings = list(warn(config, data, pace))
    lines = chosen + ([f"warning: {warning}" for warning in warnings] or ["no warnings"])
    if weights is None and config.method.cut is not None:
        lines.insert(
            0, "The encoder is untrained: regions, and thus numbers of tokens, will change."
        )
    result = {
        "config": config.model_dump(mode="json"),
        "data": asdict(data),
        "steps": asdict(pace),
        "images_per_s": pace.images_per_s,
        "hours": hours(config, pace),
        "warnings": warnings,
    }
    if report is not None:
        write_whole(report, json.dumps(result, indent=1) + "\n")
    if out is not None:
        draw(config, source, weights, out)
        lines.append(f"regions of some images: {out}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return result


def hours(config: Config, pace: Rehearsal) -> float:
    """Duration of the whole run in hours, without probes and checkpoints."""
    epochs = pace.steps // pace.steps_per_epoch
    return pace.epoch_times(config).of_run(epochs) / 3600


def warn(config: Config, data: Audit, pace: Rehearsal) -> Iterator[str]:
    """Warnings about data and settings, most harmful first."""
    yield from _of_data(config, data)
    yield from _of_steps(config, pace)


def _of_data(config: Config, data: Audit) -> Iterator[str]:
    height, width = config.data.image_size
    if data.bad:
        name, reason = data.bad[0]
        yield (
            f"{len(data.bad)} of {data.sample} images tried cannot be decoded, such as {name} "
            f"({reason}); up to {data.most_bad:.1%} of all images may be affected, and the run "
            f"stops above data.max_bad={config.data.max_bad:.1%}"
        )
    yield from data.left_out
    if data.deep:
        ends = "the smallest value of each file becomes black and the largest white"
        if not isinstance(data.levels, str):
            ends = "{} becomes black and {} white".format(*data.levels)
        yield (
            f"{len(data.deep)} of {data.sample} images tried have 16 bits, such as {data.deep[0]}: "
            f"in grey images {ends}; data.pixel_range=[LOW,HIGH] changes this"
        )
    if data.deep_colour:
        yield (
            f"{len(data.deep_colour)} of {data.sample} images tried have 16 bits per channel, such "
            f"as {data.deep_colour[0]}: the lower 8 are dropped, which leaves 4 if only 12 are used"
        )
    if data.several:
        name, pages = data.several[0]
        yield (
            f"{len(data.several)} of {data.sample} files tried hold several images, such as {name} "
            f"({pages}): only the first is read; save the others as separate files"
        )
    if data.smaller > 0:
        yield (
            f"{data.smaller:.1%} of the images have fewer pixels than data.image_size "
            f"({height} x {width}), such as {data.smallest}: their crops will be blurred"
        )
    if len(data.duplicates) > DUPLICATES * data.sample:
        one, other = data.duplicates[0]
        yield (
            f"{len(data.duplicates)} of {data.sample} images tried are duplicates, such as {one} "
            f"and {other}; the whole data set has more than this sample shows"
        )


def _of_steps(config: Config, pace: Rehearsal) -> Iterator[str]:
    if pace.memory_free and pace.memory > pace.memory_free:
        yield (
            f"a step needs {_bytes(pace.memory)}, but only {_bytes(pace.memory_free)} are free: "
            "raise optim.accumulate, or lower data.batch_size"
        )
    cores = os.cpu_count() or 1
    if config.data.workers > cores:
        yield f"data.workers={config.data.workers}, but this machine has {cores} cores"
    waiting = max(pace.start.waiting, pace.end.waiting)
    if waiting > WAITING:
        hint = (
            "raise data.workers" if config.data.workers < cores else "smaller files would be faster"
        )
        cached = "; later epochs read the images from memory" if pace.cache else ""
        yield f"steps wait for data {waiting:.0%} of the time: {hint}{cached}"
    if pace.other_precision is not None and pace.other_precision > NOTICEABLY:
        other = {"bf16": "fp32", "fp32": "bf16"}[config.runtime.precision]
        yield (
            f"runtime.precision={other} is {pace.other_precision:.1f} times as fast on this CPU as "
            f"{config.runtime.precision}"
        )


def data_table(config: Config, data: Audit) -> Table:
    """The findings of the audit."""
    table = Table("data", title_justify="left")
    table.add_column(Text(printable(config.data.source)))
    bad = f"{len(data.bad)} of {data.sample} tried; of all, at most {data.most_bad:.1%}"
    rows = {
        "images": f"{data.images}",
        "cannot be decoded": bad if data.bad or data.sample < data.images else "none",
        "width, smallest / median / largest": "{} / {} / {} px".format(*data.width),
        "height": "{} / {} / {} px".format(*data.height),
        "width / height, 5 / 50 / 95 %": "{:.2f} / {:.2f} / {:.2f}".format(*data.aspect),
        "smaller than data.image_size": f"{data.smaller:.1%}",
        "grey": f"{data.grey:.1%}",
        "duplicates": f"{len(data.duplicates)} of {data.sample} tried",
        "labels": ", ".join(f"{task}: {n} classes" for task, n in data.classes.items()) or "none",
    }
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))  # third-party names may look like markup
    return table


def cost_table(config: Config, pace: Rehearsal) -> Table:
    """The cost of the rehearsed steps, at the start and at the end of the run."""
    table = Table("one device", "at the start", "at the end")

    def both(name: str, text: str, *values: float) -> None:
        table.add_row(name, *(text.format(value) for value in values))

    ends = (pace.start, pace.end)
    both("encoder tokens per image", "{:.1f}", *(_each(end, "encoder") for end in ends))
    both("predictor tokens per image", "{:.1f}", *(_each(end, "predictor") for end in ends))
    both("predicted patches per image", "{:.1f}", *(_each(end, "predicted") for end in ends))
    both("GFLOP per image", "{:.2f}", *(end.flops / 1e9 for end in ends))
    micro = f"GFLOP for {pace.batch} images"
    both(micro, "{:.0f}", *(end.flops * pace.batch / 1e9 for end in ends))
    both("images/s", "{:.1f}", *(end.images_per_s for end in ends))
    both("GFLOP/s", "{:.0f}", *(end.flops * end.images_per_s / 1e9 for end in ends))
    both("waiting for data", "{:.1%}", *(end.waiting for end in ends))
    table.add_section()
    table.add_row("loader alone", f"{pace.loader_images_per_s:.0f} images/s")
    table.add_row("memory of a step", _bytes(pace.memory), f"{_bytes(pace.memory_free)} free")
    table.add_row("  weights, gradients, optimizer", _bytes(pace.state), "included")
    table.add_row("cache of decoded images", _bytes(pace.cache) if pace.cache else "none")
    run = f"{pace.steps} steps of {config.data.batch_size} images"
    table.add_row("the run", run, f"{hours(config, pace):.1f} hours")
    table.caption = _not_as_in_the_run(config, pace)
    return table


def _not_as_in_the_run(config: Config, pace: Rehearsal) -> str | None:
    """How the measured steps differ from those of the run."""
    depth, said = config.model.depth, []
    if pace.measured_depth < depth:
        scaled = "time scaled by FLOPs, memory computed"
        said.append(f"{pace.measured_depth} of the encoder's {depth} blocks ({scaled})")
    if pace.measured_batch < pace.batch:
        said.append(f"{pace.measured_batch} instead of {pace.batch} images at a time")
    return f"measured with {' and '.join(said)}" if said else None


def draw(config: Config, source: Source, weights: Checkpoint | None, out: Path) -> None:
    """Draw saliency and regions of the run's first crops, by its initial weights."""
    method = build_method(config).eval()
    if weights is not None:
        load_encoders(method, weights)
    size = min(PICTURES, len(source))
    seed = config.runtime.seed
    loader = Loader(source, crops_of(config), batch_size=size, seed=seed, workers=0)
    batch = next(loader.batches(0))
    with replacing(out) as unfinished:
        regions_picture(method, batch.images_BCHW, batch.keys_B).save(unfinished, format="png")


def _each(pace: Pace, part: str) -> float:
    return float(getattr(pace.tokens, part)) / pace.tokens.images


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
