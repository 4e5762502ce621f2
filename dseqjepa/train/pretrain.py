"""From a config and a folder name to a run: all checks first, then the first file.

Any problem with the arguments, the config, the data or the output folder is an
`InputError` here, before anything is written.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from dseqjepa.config import Config, RuntimeConfig, differences
from dseqjepa.data.cache import available_memory
from dseqjepa.data.labelled import located, prepare
from dseqjepa.data.loader import check_window
from dseqjepa.data.patience import read_image
from dseqjepa.data.source import BadImage, Source
from dseqjepa.errors import InputError, Stopped
from dseqjepa.methods import build_method
from dseqjepa.provenance import record
from dseqjepa.train.budget import within_minutes
from dseqjepa.train.checkpoint import Checkpoint, Start, holds_checkpoint, open_checkpoint
from dseqjepa.train.folder import claimed, is_worthless, locked
from dseqjepa.train.loggers import check_loggers
from dseqjepa.train.loop import Picture, Probe, Trainer
from dseqjepa.train.rehearsal import state_bytes, time_epochs
from dseqjepa.train.runtime import Runtime, connect, device_name, on_this_machine, place
from dseqjepa.train.trained_on import source_of

FREE_ON_RESUME = (
    "data.workers",
    "data.cache",
    "runtime.devices",
    "runtime.strategy",
    "runtime.timeout_s",
    "optim.minutes",
    "checkpoint.",
    "log.",
    "probe.",
)
"""Settings that may change on resume, since they do not change what is computed."""
CHANGES = ("config", "data")
Resume = bool | int | Literal["auto"]


def pretrain(
    config: Config,
    out: Path,
    *,
    resume: Resume = False,
    overwrite: bool = False,
    init_from: Path | None = None,
    allow_changed: Collection[str] = (),
    source: Source | None = None,
    probe: Probe | None = None,
    console: Console | None = None,
    runtime: Runtime | None = None,
    stop_after: int | None = None,
    preset: str | None = None,
    picture: Picture | None = None,
) -> None:
    """Pre-train in `out`.

    Args:
        config: the run.
        out: its folder; must be new or empty unless `resume` or `overwrite` is set.
        resume: continue the run in `out`: True from its newest checkpoint; a number from that
            step's, dropping everything after it; "auto" from the newest if there is one, otherwise
            start, even if a run died in `out` before its first checkpoint.
        overwrite: delete the run in `out` and start afresh.
        init_from: start a new run with the encoders of this one.
        allow_changed: what may differ from the resumed run: "config", "data".
        source: replaces the data named in the config, if already open.
        probe: the online evaluation.
        console: for human-readable output.
        runtime: the devices, if already connected.
        stop_after: stop after this step, as on SIGTERM.
        preset: the preset that the config was made from, recorded in run.jsonl.
        picture: draws the method, for loggers that accept pictures.

    Raises:
        InputError: before anything is written.
        RunError: while it runs.
        Stopped: by SIGTERM, with a checkpoint on disk.
    """
    config = on_this_machine(config)
    runtime = runtime or connect(config)
    ranks, began = runtime.ranks, time.perf_counter()
    is_timed = config.optim.is_timed  # until `fitting` resolves the epochs
    ranks.together(lambda: _check_how(config, resume, overwrite, init_from, allow_changed))
    with ranks.failing_together(Stopped), ExitStack() as held:
        data = ranks.together(lambda: source or open_training_source(config))
        config = ranks.together(lambda: fitting(config, data))
        ranks.check_alike(images=data.fingerprint())
        start, config = ranks.together(
            lambda: _begin(config, data, out, resume, init_from, allow_changed, is_timed)
        )
        ranks.check_alike(start=_shown(start))
        if start.resume is not None:
            folder = locked(out)
        else:
            folder = claimed(out, overwrite, start.init_from, unless_kept=resume == "auto")
        ranks.together(lambda: held.enter_context(folder) if ranks.first else None)
        if ranks.first:
            record(
                out / "run.jsonl",
                preset=preset,
                start=_shown(start),
                ranks=ranks.world,
                device=device_name(runtime.fabric.device),
            )
        prepare(data)
        if is_timed and start.resume is None:
            config, start = _in_time(config, data, start, runtime, console or Console(), began)
        Trainer(
            config,
            data,
            out,
            start,
            probe=probe,
            console=console,
            runtime=runtime,
            stop_after=stop_after,
            picture=picture,
        ).run()
        ranks.wait()


def _check_how(
    config: Config,
    resume: Resume,
    overwrite: bool,
    init_from: Path | None,
    allow_changed: Collection[str],
) -> None:
    """`InputError` for arguments of `pretrain` that contradict each other."""
    check_loggers(config.log)
    if resume is not False and (overwrite or (init_from is not None and resume != "auto")):
        raise InputError(
            "resume continues a run: leave out overwrite and init_from (resume=auto accepts "
            "init_from, for the start)"
        )
    if allow_changed and resume is False:
        raise InputError(
            "allow_changed is for a run that is resumed: add resume=true, or leave it out"
        )
    if unknown := sorted(set(allow_changed) - set(CHANGES)):
        raise InputError(f"allow_changed accepts {' and '.join(CHANGES)}, found {unknown[0]!r}")


def _begin(
    config: Config,
    data: Source,
    out: Path,
    resume: Resume,
    init_from: Path | None,
    allow_changed: Collection[str],
    is_timed: bool,
) -> tuple[Start, Config]:
    """What a run starts from, and its config with the epochs that a timed run chose."""
    if resume is False or (resume == "auto" and not holds_checkpoint(out)):
        return Start(init_from=starting_weights(config, init_from)), config
    checkpoint = _checkpoint_of(out, None if resume is True or resume == "auto" else resume)
    if is_timed:
        config = _as_chosen(config, checkpoint)
    return _resume(config, data, out, checkpoint, allow_changed), config


def _in_time(
    config: Config, data: Source, start: Start, runtime: Runtime, console: Console, began: float
) -> tuple[Config, Start]:
    """The config with as many epochs as fit into `optim.minutes`, and a start that says so."""
    if runtime.ranks.first:
        console.print("timing some steps, for optim.minutes")
    times = time_epochs(config, data, start.init_from, runtime)
    (spent,) = runtime.ranks.share(time.perf_counter() - began)[:1]
    config, chosen = within_minutes(config, times, spent)
    return config, replace(start, notes=(chosen,))


def _shown(start: Start) -> str:
    """What a run starts from, independent of its path."""
    for how, checkpoint in (("resume", start.resume), ("init_from", start.init_from)):
        if checkpoint is not None:
            return f"{how} step {checkpoint.step} ({checkpoint.digest[:12]})"
    return str(start)


def starting_weights(config: Config, init_from: Path | None) -> Checkpoint | None:
    """The checkpoint that a run starts from; `InputError` if it has a different encoder."""
    if init_from is None:
        return None
    weights = open_checkpoint(init_from)
    _check_same_encoder(config, weights)
    return weights


def open_training_source(config: Config) -> Source:
    """The training images that `data.source` names."""
    return source_of(config, "pretrain")


def fitting(config: Config, source: Source) -> Config:
    """The config with every `auto` resolved for this data.

    Raises `InputError` if no image can be decoded or there are too few, for a window without
    shards, a regularizer that sees one image at a time, or a model too large for the memory.
    """
    kind, batch, parts = config.method.regularizer, config.data.batch_size, config.optim.accumulate
    if kind != "none" and batch == parts:
        raise InputError(
            f"method.regularizer={kind} compares the images of a micro-batch, of which there is "
            f"one: make data.batch_size ({batch}) a larger multiple of optim.accumulate ({parts})"
        )
    _check_memory(config)
    check_window(config.data.window, source)
    _check_some_decode(source, config.data.source)
    if len(source) < config.data.batch_size:
        raise InputError(
            f"{config.data.source} has {len(source)} images, fewer than data.batch_size="
            f"{config.data.batch_size}: lower it to {len(source)} or less, or give more images"
        )
    return config.resolved(len(source))


LARGE = {
    "encoder": "model.width, model.depth or model.mlp",
    "predictor": "predictor.width or predictor.depth",
    "regularizer": "method.vicreg.projector_width",
}
"""The settings that make a part of a method large."""


def _check_memory(config: Config) -> None:
    """`InputError` if weights, gradients and optimizer state alone exceed the memory."""
    with torch.device("meta"):  # shapes without values
        method = build_method(config)
    needed, there = state_bytes(method), _memory(config.runtime)
    if not there or needed <= there:
        return
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()
    }
    largest = max(LARGE.keys() & parts.keys(), key=lambda name: parts[name])
    raise InputError(
        f"the model needs {needed / 1e9:.3g} GB for weights, gradients and optimizer, but only "
        f"{there / 1e9:.3g} GB are available: lower {LARGE[largest]}"
    )


def _memory(runtime: RuntimeConfig) -> int:
    """Bytes available for one copy of a model's state, which sharding spreads over all machines; 0
    if unknown."""
    here = place()
    if runtime.accelerator in ("auto", "cuda") and torch.cuda.is_available():
        ranks = here.world if runtime.strategy == "fsdp" else 1
        return ranks * torch.cuda.get_device_properties(0).total_memory
    copies = here.on_node / here.world if runtime.strategy == "fsdp" else here.on_node
    return int(available_memory() / copies)


def _check_some_decode(source: Source, name: str) -> None:
    """Entirely unreadable data is an input error, not a failed run."""
    reasons = []
    for index in range(0, len(source), max(len(source) // 16, 1)):
        try:
            read_image(source, index)
        except BadImage as error:
            reasons.append(f"{source.name(index)}: {error}")
        else:
            return
    raise InputError(f"{name}: none of {len(reasons)} images tried can be decoded ({reasons[0]})")


def _checkpoint_of(out: Path, step: int | None) -> Checkpoint:
    """The checkpoint to resume from."""
    if is_worthless(out):
        raise InputError(
            f"{out} has no checkpoint: the run in it died before its first one, so there is "
            "nothing to resume; use resume=auto to restart it"
        )
    checkpoint = open_checkpoint(out, step)
    if "imported_from" in checkpoint.state:
        raise InputError(
            f"{out} is an imported encoder, not a run: start a run with init_from={out}"
        )
    return checkpoint


def _as_chosen(config: Config, checkpoint: Checkpoint) -> Config:
    """The config with the epochs that the time budget set when the run began."""
    then = checkpoint.config.optim
    if config.optim.minutes != then.minutes:
        raise InputError(
            f"cannot resume {checkpoint.run} with optim.minutes={config.optim.minutes:g}: it began "
            f"with optim.minutes={then.minutes} and optim.epochs={then.epochs}; keep these values, "
            f"or train longer in another folder, with init_from={checkpoint.run}"
        )
    return config.with_(optim={"epochs": then.epochs, "warmup_epochs": then.warmup_epochs})


def _resume(
    config: Config,
    source: Source,
    out: Path,
    checkpoint: Checkpoint,
    allow_changed: Collection[str],
) -> Start:
    changed = {
        key: values
        for key, values in differences(checkpoint.config, config).items()
        if not key.startswith(FREE_ON_RESUME)
    }
    notes = []
    kept = checkpoint.state.get("data_path", located(checkpoint.config.data.source))
    if located(config.data.source) == kept:
        changed.pop("data.source", None)  # another spelling of the same
    if changed:
        shown = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        if "config" not in allow_changed:
            raise InputError(
                f"cannot resume {out} with another config ({shown}): give the old values, start a "
                "new run with init_from, or accept the change with allow_changed=config"
            )
        notes.append(f"changed config: {shown}")
    if checkpoint.state["data_fingerprint"] != source.fingerprint():
        if "data" not in allow_changed:
            raise InputError(
                f"cannot resume {out}: the images of {config.data.source} are not those of the "
                "checkpoint (the list or sizes changed): start a new run with init_from, or accept "
                "the change with allow_changed=data"
            )
        notes.append(
            "changed images: the rest of this epoch follows their new order, so it may repeat "
            "images already seen in it and leave out others"
        )
    return Start(resume=checkpoint, notes=tuple(notes))


def _check_same_encoder(config: Config, weights: Checkpoint) -> None:
    changed = differences(weights.config, config)
    own = ("data.image_size", "data.mean", "data.std")
    shape = [key for key in changed if key.startswith("model.") or key in own]
    if shape:
        shown = ", ".join(
            f"{key} {changed[key][0]!r} there, {changed[key][1]!r} here" for key in shape
        )
        settings = weights.run / "config.yaml"
        hint = (
            f"; use {settings} as the preset, which has its settings" if settings.is_file() else ""
        )
        raise InputError(f"init_from {weights.path} is a different encoder: {shown}{hint}")
