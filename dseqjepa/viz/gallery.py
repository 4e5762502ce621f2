"""Images for the pictures: from files, folders, and anything `data=` accepts.

Suffixes: B images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.data.decode import ENDINGS
from dseqjepa.data.images import ImageFiles, ImageFolder, Subset, no_such_image
from dseqjepa.data.patience import read_image
from dseqjepa.data.scenes import SPECS
from dseqjepa.data.source import BadImage, Source
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.keyed import sample_keys
from dseqjepa.train.trained_on import source_of


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images at a run's size, as its encoder sees them, and their names."""

    images_BCHW: UInt8[Tensor, "B 3 H W"]
    names: tuple[str, ...]
    keys_B: Int64[Tensor, " B"]
    """Keys for random blocks: a function of the run's seed and the image's position."""


def gather(words: Sequence[str], config: Config, *, limit: int) -> Gallery:
    """Every named image file, and `limit` images of each folder or `data=` source.

    A source's images are evenly spaced, so that all classes of a sorted folder appear; if it has
    splits, held-out images are used. `EvalTransform` resizes images to the run's size.

    Raises:
        InputError: a file that is not an image, or the errors of `open_source`.
    """
    images: list[Tensor] = []
    names: list[str] = []
    paths = [str(Path(word).expanduser()) for word in words]
    files = ImageFiles(Path(), [path for path in paths if Path(path).is_file()])
    files.pixel_range = config.data.pixel_range
    numbers = iter(range(len(files)))
    for word in words:
        path = Path(word).expanduser()
        if path.is_file():
            number = next(numbers)
            images.append(_image(files, number))
            names.append(files.name(number))
        elif path.suffix.lower() in ENDINGS and not path.exists():
            raise no_such_image(path)
        else:
            found = spread(open_images(word, config), limit)
            for index in range(len(found)):
                images.append(_image(found, index))
                names.append(found.name(index))
    transform = EvalTransform(config.data.image_size)
    keys_B = sample_keys(config.runtime.seed, 0, torch.arange(len(images)))
    return Gallery(torch.stack([transform(image) for image in images]), tuple(names), keys_B)


def open_images(spec: str, config: Config) -> Source:
    """The data named by `data=`, read with the config's settings: its held-out split if it has
    one, else all of it."""
    path = Path(spec).expanduser()
    if spec not in SPECS and path.is_dir():
        folder = ImageFolder(path, "val")
        folder.pixel_range = config.data.pixel_range
        return folder
    return source_of(config, "val", spec)


def spread(source: Source, most: int) -> Subset:
    """At most this many images, evenly spaced in the source's order."""
    count = min(most, len(source))
    return Subset(source, (np.arange(count) * len(source) // max(count, 1)).astype(np.int64))


def _image(source: Source, index: int) -> Tensor:
    try:
        return read_image(source, index).image_CHW
    except BadImage as error:
        raise InputError(f"cannot decode {source.name(index)}: {error}") from None
