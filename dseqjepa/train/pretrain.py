"""From a config and a folder name to a run: every check first, then the first file.

Whatever can be wrong with the arguments, the config, the data or the output folder is an
`InputError` here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from dseqjepa.config import Config, differences
from dseqjepa.data.labelled import located, open_source, prepare
from dseqjepa.data.patience import read_image
from dseqjepa.data.source import BadImage, Source
from dseqjepa.errors import InputError
from dseqjepa.train.checkpoint import Checkpoint, Start, open_checkpoint
from dseqjepa.train.folder import claimed, locked
from dseqjepa.train.loop import Probe, Trainer
from dseqjepa.train.runtime import Runtime, Stopped, connect

FREE_ON_RESUME = (
    "data.workers",
    "data.cache",
    "runtime.devices",
    "runtime.strategy",
    "runtime.timeout_s",
    "checkpoint.",
    "log.",
    "probe.",
)
"""What may change when a run goes on: nothing of it changes what is computed."""
CHANGES = ("config", "data")


def pretrain(
    config: Config,
    out: Path,
    *,
    resume: bool | int = False,
    overwrite: bool = False,
    init_from: Path | None = None,
    allow_changed: Collection[str] = (),
    source: Source | None = None,
    probe: Probe | None = None,
    console: Console | None = None,
    runtime: Runtime | None = None,
    stop_after: int | None = None,
) -> None:
    """Pre-train in `out`.

    Args:
        config: the run.
        out: its folder; a new or empty one unless `resume` or `overwrite` says otherwise.
        resume: go on with the run in `out`: True from its newest checkpoint, a number from that of
            this step, which drops what came after.
        overwrite: remove the run in `out` and start anew.
        init_from: start a new run with the encoders of this one.
        allow_changed: what may differ from the run that is resumed: "config", "data".
        source: replaces the data that the config names, if it is open already.
        probe: the online evaluation.
        console: where the lines for people go.
        runtime: the devices, if they are connected already.
        stop_after: stop after this step, as SIGTERM would.

    Raises:
        InputError: before anything is written.
        RunError: while it runs.
        Stopped: by SIGTERM, with a checkpoint on disk.
    """
    if resume is not False and (overwrite or init_from is not None):
        raise InputError("resume goes on with a run: leave out overwrite and init_from")
    if unknown := sorted(set(allow_changed) - set(CHANGES)):
        raise InputError(f"allow_changed takes {' and '.join(CHANGES)}, found {unknown[0]!r}")
    runtime = runtime or connect(config)
    ranks = runtime.ranks
    with ranks.failing_together(Stopped), ExitStack() as held:
        data = ranks.together(lambda: source or open_training_source(config))
        config = ranks.together(lambda: fitting(config, data))
        if len(set(ranks.share(data.fingerprint()))) > 1:
            raise InputError(f"{config.data.source} does not hold the same images for every rank")

        def begin() -> Start:
            if resume is False:
                return Start(init_from=starting_weights(config, init_from))
            return _go_on(config, data, out, None if resume is True else resume, allow_changed)

        start = ranks.together(begin)
        folder = locked(out) if resume is not False else claimed(out, overwrite, start.init_from)
        ranks.together(lambda: held.enter_context(folder) if ranks.first else None)
        prepare(data)
        Trainer(
            config,
            data,
            out,
            start,
            probe=probe,
            console=console,
            runtime=runtime,
            stop_after=stop_after,
        ).run()
        ranks.wait()


def starting_weights(config: Config, init_from: Path | None) -> Checkpoint | None:
    """The checkpoint that a run starts from; `InputError` if it is of another encoder."""
    if init_from is None:
        return None
    weights = open_checkpoint(init_from)
    _check_same_encoder(config, weights)
    return weights


def open_training_source(config: Config) -> Source:
    """The training images that `data.source` names."""
    return open_source(
        config.data.source,
        split="pretrain",
        size=config.data.size,
        image_size=config.data.image_size,
        seed=config.runtime.seed,
        pixel_range=config.data.pixel_range,
    )


def fitting(config: Config, source: Source) -> Config:
    """The config with every `auto` settled for this data.

    Raises `InputError` where nothing can be decoded, or there are too few images.
    """
    _check_some_decode(source, config.data.source)
    if len(source) < config.data.batch_size:
        raise InputError(
            f"{config.data.source} has {len(source)} images, fewer than data.batch_size="
            f"{config.data.batch_size}: lower it to {len(source)} or less, or give more images"
        )
    return config.resolved(len(source))


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


def _go_on(
    config: Config, source: Source, out: Path, step: int | None, allow_changed: Collection[str]
) -> Start:
    checkpoint = open_checkpoint(out, step)
    if "imported_from" in checkpoint.state:
        raise InputError(f"{out} is an imported encoder, no run: start a run with init_from={out}")
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
                f"cannot resume {out} with another config ({shown}); give the old values, start a "
                "new run with init_from, or accept it with allow_changed=config"
            )
        notes.append(f"another config than before: {shown}")
    if checkpoint.state["data_fingerprint"] != source.fingerprint():
        if "data" not in allow_changed:
            raise InputError(
                f"cannot resume {out}: the images of {config.data.source} are not those of the "
                "checkpoint (its list or sizes changed); start a new run with init_from, or accept "
                "it with allow_changed=data"
            )
        notes.append(
            "other images than before: this epoch sees each of them at most once, but not those "
            "that its first part saw by the old list"
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
        raise InputError(f"init_from {weights.path} is another encoder: {shown}")
