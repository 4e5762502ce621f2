"""The images that a config names, and those that a run was trained on, wherever one stands."""

from __future__ import annotations

from dseqjepa.config import Config
from dseqjepa.data.labelled import open_source
from dseqjepa.data.source import Source, Split
from dseqjepa.errors import InputError, printable
from dseqjepa.train.checkpoint import Checkpoint


def source_of(config: Config, split: Split, spec: str | None = None) -> Source:
    """A part of the images that a config names, or that `spec` does, read as the config says."""
    data = config.data
    return open_source(
        spec or data.source,
        split=split,
        size=data.size,
        image_size=data.image_size,
        seed=config.runtime.seed,
        pixel_range=data.pixel_range,
    )


def trained_on(checkpoint: Checkpoint) -> str:
    """What `data=` has to be for the images that a checkpoint's run was trained on.

    The path is the one that the run kept, or else the one that was typed, if it leads to the same
    images from here.

    Raises:
        InputError: the run does not say, or neither path leads to images with the names and sizes
            that it saw.
    """
    config, state = checkpoint.config, checkpoint.state
    if "data_fingerprint" not in state:
        raise InputError(
            f"data=PATH is missing: {checkpoint.run} does not say what it was trained on"
        )
    typed = config.data.source
    reasons = []
    for spec in dict.fromkeys([state.get("data_path", typed), typed]):
        try:
            source = source_of(config, "pretrain", spec)
        except InputError as error:
            reasons.append(str(error))
            continue
        if source.fingerprint() == state["data_fingerprint"]:
            return spec
        reasons.append(f"{printable(spec)} holds other images than the run saw")
    raise InputError(
        f"the images that {checkpoint.run} was trained on are not there: {'; '.join(reasons)}; "
        "name them by data=PATH"
    )
