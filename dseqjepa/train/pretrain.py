"""From a config and a folder name to a run: every check first, then the first file.

Whatever can be wrong with the arguments, the config, the data or the output folder is an
`InputError` here, before anything is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from dseqjepa.config import Config, differences
from dseqjepa.data.labelled import open_source, prepare
from dseqjepa.data.patience import read_image
from dseqjepa.data.source import BadImage, Source
from dseqjepa.errors import InputError
from dseqjepa.train.checkpoint import Checkpoint, open_checkpoint
from dseqjepa.train.loop import Probe, Start, Trainer

RUN_FILES = frozenset(
    {
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "bad_files.jsonl",
        "skipped.jsonl",
        "checkpoints",
        "evaluations",
    }
)
FREE_ON_RESUME = ("data.workers", "runtime.devices", "checkpoint.", "log.", "probe.")
"""What may change when a run goes on: nothing of it changes what is computed."""


def pretrain(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    init_from: Path | None = None,
    source: Source | None = None,
    probe: Probe | None = None,
    console: Console | None = None,
) -> None:
    """Pre-train in `out`. `source` replaces the data that the config names, if it is open already.

    Raises `InputError` before anything is written; `RunError` and `Stopped` while it runs.
    """
    if resume and (overwrite or init_from is not None):
        raise InputError("resume=true goes on with a run: leave out overwrite and init_from")
    _check_accelerator(config)
    if source is None:
        source = open_training_source(config)
    _check_some_decode(source, config.data.source)
    config = config.resolved(len(source))
    step_images = config.data.batch_size
    if len(source) < step_images:
        raise InputError(
            f"{config.data.source} has {len(source)} images, fewer than data.batch_size="
            f"{step_images}: lower it to {len(source)} or less, or give more images"
        )
    past = _check_resume(config, source, out) if resume else None
    weights = open_checkpoint(init_from) if init_from is not None else None
    if weights is not None:
        _check_same_encoder(config, weights)
    if not resume:
        claim(out, overwrite, kept=weights)
    prepare(source)
    Trainer(
        config,
        source,
        out,
        Start(resume=past, init_from=weights),
        probe=probe,
        console=console,
    ).run()


def open_training_source(config: Config) -> Source:
    """The training images that `data.source` names."""
    return open_source(
        config.data.source,
        split="train",
        size=config.data.size,
        image_size=config.data.image_size,
        seed=config.runtime.seed,
    )


def _check_accelerator(config: Config) -> None:
    wanted = config.runtime.accelerator
    present: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if wanted in present and not present[wanted]():
        raise InputError(
            f"runtime.accelerator={wanted}: torch finds no such device here; use auto or cpu"
        )


def _check_some_decode(source: Source, name: str) -> None:
    """A folder of which nothing can be read is an input error, not a failed run."""
    reasons = []
    for index in range(0, len(source), max(len(source) // 16, 1)):
        try:
            read_image(source, index)
        except BadImage as error:
            reasons.append(f"{source.name(index)}: {error}")
        else:
            return
    raise InputError(f"{name}: none of {len(reasons)} images tried can be decoded ({reasons[0]})")


def _check_resume(config: Config, source: Source, out: Path) -> Checkpoint:
    checkpoint = open_checkpoint(out)
    if "imported_from" in checkpoint.state:
        raise InputError(f"{out} is an imported encoder, no run: start a run with init_from={out}")
    changed = {
        key: values
        for key, values in differences(checkpoint.config, config).items()
        if not key.startswith(FREE_ON_RESUME)
    }
    if changed:
        shown = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise InputError(
            f"cannot resume {out} with another config ({shown}); "
            "give the old values, or start a new run with init_from"
        )
    if checkpoint.state["data_fingerprint"] != source.fingerprint():
        raise InputError(
            f"cannot resume {out}: the images of {config.data.source} are not those of the "
            "checkpoint (its list or sizes changed); start a new run with init_from"
        )
    return checkpoint


def _check_same_encoder(config: Config, weights: Checkpoint) -> None:
    changed = differences(weights.config, config)
    shape = [key for key in changed if key.startswith("model.") or key == "data.image_size"]
    if shape:
        shown = ", ".join(
            f"{key} {changed[key][0]!r} there, {changed[key][1]!r} here" for key in shape
        )
        raise InputError(f"init_from {weights.path} is another encoder: {shown}")


def claim(out: Path, overwrite: bool, kept: Checkpoint | None) -> None:
    """Make `out` an empty folder; remove an old run where that was asked for, nothing else."""
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"out={out} is a file: give a folder")
    try:
        present = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if present and not overwrite:
            raise InputError(
                f"out={out} is not empty: give another folder, resume=true to go on with the run "
                "in it, or overwrite=true to replace it"
            )
        foreign = sorted(present - RUN_FILES)
        if foreign:
            raise InputError(
                f"overwrite=true: {out} also holds {foreign[0]!r}, which is not of a run"
            )
        if present and kept is not None and kept.path.is_relative_to(out.resolve()):
            raise InputError(f"overwrite=true would remove {kept.path}, which init_from names")
        for name in present:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be used: {error.strerror}; give another") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"out={out} cannot be written to: give another, or change its permissions")
