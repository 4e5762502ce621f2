"""`dj.embed`: the features of images in memory, for a notebook.

Suffixes: M images that could be decoded, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

from dseqjepa.data.dataset import DatasetSource
from dseqjepa.data.images import name_of
from dseqjepa.data.source import Source
from dseqjepa.embeddings.images import named_images
from dseqjepa.model.vit import VisionTransformer, in_eval_mode
from dseqjepa.tasks.backbone import OwnBackbone
from dseqjepa.tasks.features import extract


class Embedded(NamedTuple):
    """Features of images, on the CPU."""

    names: tuple[str, ...]
    features_MD: Float[Tensor, "M D"]
    labels: Mapping[str, Int64[Tensor, " M"]]
    """Task -> one label per image; a folder of class folders has "class"."""
    bad: tuple[tuple[str, str], ...]
    """(name, reason) of each image left out because it could not be decoded."""


def embed(
    encoder: VisionTransformer,
    images: str | Path | Sequence[str | Path] | Source | Dataset[Any],
    *,
    features: str = "last",
    image_size: tuple[int, int] | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> Embedded:
    """Features of every image, computed on the encoder's device and returned on the CPU.

    Args:
        encoder: from `load_encoder`, or one in training; it is not modified.
        images: a folder, image files, a `.txt` list of paths; a `Source`; or a torch Dataset of
            images.
        features: `last` (mean patch of the last block), `last4`, `cls`, `block7`, ...
        image_size: height and width in pixels; those of pre-training by default.

    Raises:
        InputError: the images do not exist, none can be decoded, or the feature is unknown.
    """
    if isinstance(images, str | Path):
        images = [images]
    if isinstance(images, list | tuple):
        source: Source = named_images([str(word) for word in images])
    elif isinstance(images, Source):
        source = images
    else:
        source = DatasetSource(images)  # type: ignore[arg-type]
    rows, columns = encoder.grid
    own_size = (rows * encoder.patch_size, columns * encoder.patch_size)
    stem = copy(encoder)  # a backbone takes it apart
    stem._modules = {**encoder._modules}
    backbone = OwnBackbone(stem, image_size or own_size)
    pieces = backbone.pieces(features)
    with in_eval_mode(backbone):  # parts of the encoder
        found = extract(
            backbone, source, backbone.image_size, pieces, batch_size=batch_size, workers=workers,
            device=encoder.pos_embed.device,
        )  # fmt: skip
    names = tuple(name_of(source, index) for index in found.index_M.tolist())
    return Embedded(names, found.feature(*pieces), found.labels, found.bad)
