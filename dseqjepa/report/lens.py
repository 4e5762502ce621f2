"""The region lens: how a run's checkpoints predict a few images, as plain values for the page.

Suffixes: B images, C colours, h and w rows and columns of patches, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dseqjepa.config import Config, CutConfig
from dseqjepa.data.images import ImageFiles, name_of
from dseqjepa.data.patience import read_image
from dseqjepa.data.source import BadImage, Source
from dseqjepa.data.transforms import EvalTransform, center_crop, cover, resize
from dseqjepa.errors import InputError, printable
from dseqjepa.keyed import Stream, sample_keys, shuffled
from dseqjepa.report.run import Run, step_of
from dseqjepa.train.checkpoint import described, load_method
from dseqjepa.train.trained_on import source_of, trained_on
from dseqjepa.viz.tiles import data_uri, label_patch
from dseqjepa.viz.trace import Trace, trace

MOST_CHECKPOINTS = 12
"""Maximum number of checkpoints shown, evenly spaced, including the first and the last."""
SHOWN_SIDE = 256
"""Maximum pixels of the longer side of an image in the page."""
LEVELS = 255


@dataclass(frozen=True, eq=False)
class LensImages:
    """The images of a lens, as the page shows them and as the encoder sees them."""

    pictures: Sequence[Mapping[str, str]]
    """`src`, a data URI, `name` and `label` ("" if there is none)."""
    images_BCHW: UInt8[Tensor, "B 3 H W"]
    indices: Sequence[int]
    """Their indices in the source."""
    are_held_out: bool


@dataclass(frozen=True)
class Lens:
    """A run's part of the lens; `content` is plain JSON, None if there is nothing to show."""

    content: Mapping[str, Any] | None
    notes: Sequence[str]
    """What is missing and why, one sentence each."""


def build_lens(run: Run, images: int, shared: CutConfig) -> Lens:
    """Trace `images` images of a run's data through its kept checkpoints.

    `notes` lists what cannot be shown because the data is gone or a checkpoint is damaged.

    Args:
        images: how many to choose; fewer if the data has fewer decodable ones.
        shared: how to cut images for a method without its own regions.
    """
    if not run.checkpoints:
        return Lens(None, ["There is no checkpoint to show."])
    try:
        spec = _data_of(run)
        chosen = choose_images(run.config.with_(data={"source": spec}), images)
    except InputError as error:
        return Lens(None, [f"The images are no longer available ({printable(error)})."])
    if not chosen.pictures:
        return Lens(None, [f"No image of {run.config.data.source} can be decoded."])
    keys_B = sample_keys(run.config.runtime.seed, 0, torch.tensor(list(chosen.indices)))
    kept = evenly(run.checkpoints, MOST_CHECKPOINTS)
    notes = []
    if len(kept) < len(run.checkpoints):
        notes.append(f"{len(kept)} of the {len(run.checkpoints)} checkpoints are shown.")
    looks = []
    for folder in kept:
        try:
            traces = trace(load_method(folder), chosen.images_BCHW, keys_B, cut=shared)
        except InputError as error:
            notes.append(f"Left out: {printable(error)}.")
        else:
            looks.append({"step": step_of(folder), "images": [_plain(item) for item in traces]})
    if not looks:
        return Lens(None, [*notes, "No checkpoint could be read."])
    content = {
        "run": run.name,
        "grid": list(run.config.grid),
        "pictures": list(chosen.pictures),
        "origin": "held out of training" if chosen.are_held_out else "seen in training",
        "ranks": traces[0].regions_are_own,
        "saliency": traces[0].saliency_kind.replace("_", " "),
        "checkpoints": looks,
    }
    return Lens(content, notes)


def _data_of(run: Run) -> str:
    """The data that the newest readable checkpoint of a run was trained on; images of any other
    folder are not the run's, whatever its config says."""
    for folder in reversed(run.checkpoints):
        try:
            checkpoint = described(folder)
        except InputError:
            continue  # the lens says which one is damaged
        return trained_on(checkpoint)
    raise InputError("no checkpoint can be read")


def choose_images(config: Config, count: int) -> LensImages:
    """A seeded choice of a run's images, held-out ones if there are any.

    Raises:
        InputError: the data is missing, or has changed.
    """
    source, are_held_out = _source(config)
    keys_N = sample_keys(config.runtime.seed, 0, torch.arange(len(source)))
    order = shuffled(keys_N, Stream.SPLIT).tolist()
    pictures: list[dict[str, str]] = []
    seen, indices = [], []
    fit = EvalTransform(config.data.image_size)
    for index in order:
        if len(pictures) == count:
            break
        try:
            image_CHW = read_image(source, index).image_CHW
        except BadImage:
            continue  # the run's bad_files.jsonl names it
        pictures.append(
            {
                "src": data_uri(_shown(image_CHW, config.data.image_size)),
                "name": printable(name_of(source, index)),
                "label": _label(source, index),
            }
        )
        seen.append(fit(image_CHW))
        indices.append(index)
    size = (0, 3, *config.data.image_size)
    images_BCHW = torch.stack(seen) if seen else torch.empty(size, dtype=torch.uint8)
    return LensImages(pictures, images_BCHW, indices, are_held_out)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(index)] for index in np.linspace(0, len(items) - 1, most)]


def _source(config: Config) -> tuple[Source, bool]:
    """The held-out part of the data, if there is one, and whether there is."""
    source = source_of(config, "train")
    if isinstance(source, ImageFiles) and not source.has_splits:
        return source, False
    try:
        return source_of(config, "val"), True
    except InputError:  # only the training images are here
        return source, False


def _label(source: Source, index: int) -> str:
    if "class" not in source.labels:
        return ""
    return printable(source.classes["class"][int(source.labels["class"][index])])


def _shown(image_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of an image that `EvalTransform(size)` keeps, at higher resolution if available."""
    height, width = image_CHW.shape[-2:]
    if (height, width) != size:
        cover_height, cover_width = cover(size)
        enlarged = max(cover_height / height, cover_width / width)
        kept = max(1, round(size[0] / enlarged)), max(1, round(size[1] / enlarged))
        image_CHW = center_crop(image_CHW, kept)
    scale = min(SHOWN_SIDE / max(size), max(1.0, image_CHW.shape[-2] / size[0]))
    return resize(image_CHW, (round(size[0] * scale), round(size[1] * scale)))


def _plain(item: Trace) -> dict[str, Any]:
    """A trace as JSON: maps row by row, masks as strings of 0 and 1, losses of the target only."""
    low, high = float(item.saliency_hw.min()), float(item.saliency_hw.max())
    scaled_hw = (item.saliency_hw - low) / ((high - low) or 1.0) * LEVELS
    return {
        "saliency": scaled_hw.round().astype(int).ravel().tolist(),
        "rank": item.rank_hw.ravel().tolist(),
        "count": item.count,
        "ranked": item.is_ranked,
        "labels": [
            list(label_patch(inside)) if (inside := item.rank_hw == rank).any() else None
            for rank in range(item.count)  # a random region may be covered by those before it
        ],
        "steps": [
            {
                "number": step.number,
                "context": _bits(step.context_hw),
                "target": _bits(step.target_hw),
                "loss": _short(step.loss),
                "losses": [_short(value) for value in step.loss_hw[step.target_hw].tolist()],
            }
            for step in item.steps
        ],
    }


def _bits(mask_hw: np.ndarray) -> str:
    return "".join("1" if inside else "0" for inside in mask_hw.ravel())


def _short(value: float) -> float | None:
    """Five significant digits; None, which is valid JSON, for non-finite values."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
