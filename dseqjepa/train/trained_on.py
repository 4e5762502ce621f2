"""The images and crops named by a config, and the images a run was trained on, from any working
directory."""

from __future__ import annotations

from dseqjepa.config import Config
from dseqjepa.data.labelled import open_source
from dseqjepa.data.source import Source, Split
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError, printable
from dseqjepa.train.checkpoint import Checkpoint


def source_of(config: Config, split: Split, spec: str | None = None) -> Source:
    """A split of the images named by a config, or by `spec`, read with the config's settings."""
    data = config.data
    return open_source(
        spec or data.source,
        split=split,
        size=data.size,
        image_size=data.image_size,
        seed=config.runtime.seed,
        pixel_range=data.pixel_range,
    )


def crops_of(config: Config) -> TrainTransform:
    """The random crops that a run trains on."""
    data = config.data
    return TrainTransform(data.image_size, data.crop_scale, data.flip)


def trained_on(checkpoint: Checkpoint) -> str:
    """The value of `data=` for the images that a checkpoint's run was trained on.

    This is the absolute path recorded by the run, or else the path as typed, if it leads to the
    same images.

    Raises:
        InputError: the run recorded none, or neither path has images with the same names and
            sizes.
    """
    config, state = checkpoint.config, checkpoint.state
    if "data_fingerprint" not in state:
        raise InputError(
            f"data=PATH is missing: {checkpoint.run} does not record what it was trained on"
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
        reasons.append(f"{printable(spec)} contains other images than the run saw")
    raise InputError(
        f"cannot find the images that {checkpoint.run} was trained on: {'; '.join(reasons)}; "
        "give their path as data=PATH"
    )
