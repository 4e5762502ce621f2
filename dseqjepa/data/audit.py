"""What a data set holds, as far as a sample of it tells: sizes, bad files, duplicates, colours.

Suffixes: N images of the source, M images of the sample that can be decoded, 2 height and width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dseqjepa.data.decode import Header
from dseqjepa.data.images import ImageFiles, notes_of
from dseqjepa.data.patience import read_image
from dseqjepa.data.source import BadImage, Source
from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, hash_int64, shuffled

SAMPLE = 500


@dataclass(frozen=True)
class Audit:
    """Sizes are in pixels; shares are of the sample's images that can be decoded."""

    images: int
    sample: int
    bad: tuple[tuple[str, str], ...]
    """(name, reason) of the sample's images that cannot be decoded."""
    most_bad: float
    """The share of bad images that the whole set hardly exceeds (`bound`)."""
    height: tuple[int, int, int]
    """Smallest, median, largest; so is `width`."""
    width: tuple[int, int, int]
    aspect: tuple[float, float, float]
    """Width / height: 5th, 50th and 95th percentile."""
    smaller: float
    """Share with fewer pixels than wanted, in height or in width."""
    smallest: str
    """The name of the image with the fewest pixels."""
    grey: float
    duplicates: tuple[tuple[str, str], ...]
    """(name, name): an image of the sample, and the one before it with the very same pixels."""
    classes: dict[str, int]
    """Task -> number of its classes, over the whole set."""
    left_out: tuple[str, ...]
    """What of the data set is not read, and why, a sentence each."""
    deep: tuple[str, ...]
    """The names of the sample's images of 16 bits a colour."""
    deep_colour: tuple[str, ...]
    """Those of them that are not grey: the lower 8 bits are lost."""
    levels: tuple[int, int] | str
    """The values of 16-bit grey that become black and white, "file": those of each file."""
    several: tuple[tuple[str, int], ...]
    """(name, number) of the sample's files with several pages or frames, of which the first is
    read."""


def audit(
    source: Source, image_size: tuple[int, int], *, seed: int = 0, sample: int = SAMPLE
) -> Audit:
    """Look at `sample` images of a source, or at all of them if there are no more.

    Args:
        image_size: height and width that the model wants.
        seed: of the sample.

    Raises:
        InputError: none of the sample can be decoded.
    """
    bad, names, sizes, grey = [], [], [], []
    duplicates = []
    headers: list[tuple[str, Header]] = []
    seen: dict[bytes, str] = {}
    chosen = _sample(len(source), sample, seed)
    for index in chosen:
        name = source.name(index)
        try:
            image_CHW = read_image(source, index).image_CHW
        except BadImage as reason:
            bad.append((name, str(reason)))
            continue
        names.append(name)
        if isinstance(source, ImageFiles):
            headers.append((name, source.facts(index)))
        sizes.append(image_CHW.shape[-2:])
        grey.append(bool((image_CHW == image_CHW[:1]).all()))
        first = seen.setdefault(_hash(image_CHW), name)
        if first is not name:
            duplicates.append((name, first))
    if not names:
        raise InputError(f"none of {len(bad)} images tried can be decoded ({': '.join(bad[0])})")
    deep = tuple(name for name, header in headers if header.is_deep)
    size_M2 = np.array(sizes)
    low, middle, high = np.percentile(size_M2, (0, 50, 100), axis=0).round().astype(int).tolist()
    aspect = np.percentile(size_M2[:, 1] / size_M2[:, 0], (5, 50, 95)).tolist()
    return Audit(
        images=len(source),
        sample=len(chosen),
        bad=tuple(bad),
        most_bad=bound(len(bad), len(chosen), len(source)),
        height=(low[0], middle[0], high[0]),
        width=(low[1], middle[1], high[1]),
        aspect=tuple(aspect),
        smaller=float((size_M2 < image_size).any(axis=1).mean()),
        smallest=names[int(size_M2.prod(axis=1).argmin())],
        grey=float(np.mean(grey)),
        duplicates=tuple(duplicates),
        left_out=notes_of(source),
        deep=deep,
        deep_colour=tuple(
            name for name, header in headers if header.is_deep and not header.is_grey
        ),
        levels=source.levels if deep and isinstance(source, ImageFiles) else "file",
        several=tuple((name, header.frames) for name, header in headers if header.frames > 1),
        classes={task: len(np.unique(label_N)) for task, label_N in source.labels.items()},
    )


def bound(bad: int, sample: int, images: int) -> float:
    """The share of bad images that is exceeded with a probability of 5 % only, `bad` of a
    sample being so (Wilson's interval, one-sided); of a whole set, its share."""
    share = bad / sample
    if sample == images:
        return share
    z = 1.645  # of the normal distribution, 5 % lie above
    centre = share + z * z / (2 * sample)
    spread = z * (share * (1 - share) / sample + z * z / (4 * sample * sample)) ** 0.5
    return (centre + spread) / (1 + z * z / sample)


def _sample(images: int, sample: int, seed: int) -> list[int]:
    keys_N = hash_int64(seed, torch.arange(images))
    order_N = shuffled(keys_N, Stream.AUDIT)
    return sorted(order_N[:sample].tolist())


def _hash(image_CHW: Tensor) -> bytes:
    shape = str(tuple(image_CHW.shape)).encode()
    return hashlib.sha256(shape + image_CHW.numpy().tobytes()).digest()
