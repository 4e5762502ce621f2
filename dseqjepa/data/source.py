"""What every data set looks like to the rest: images by index, labels where there are some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor


@runtime_checkable
class Source(Protocol):
    """A fixed list of images.

    `labels` maps a task ("class", "count", ...) to one int64 label an image, `classes` the same
    task to the names of its labels. Both are empty where the data has no labels.
    """

    labels: Mapping[str, np.ndarray]
    classes: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """The image as uint8 [3, H, W]; raises `BadImage` where it cannot be decoded."""
        ...

    def name(self, index: int) -> str:
        """How a person finds this image again: a path, or a number."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes with the list of images; cheap, so it does not read the pixels."""
        ...


class BadImage(Exception):
    """One image that cannot be decoded. The message holds the reason, not the name."""


Reduction = Callable[[int, int], int]
"""Height and width of an image -> 1, 2, 4 or 8: how much smaller it may be decoded."""


class Decoded(NamedTuple):
    """An image, decoded `reduction` times smaller than its `height` and `width` (rounded up)."""

    image_CHW: Tensor
    height: int
    width: int
    reduction: int


@runtime_checkable
class Reducible(Protocol):
    """What a source may offer beside: to decode an image smaller, where that costs less."""

    def reduced(self, index: int, reduction: Reduction) -> Decoded:
        """The image, not smaller than `reduction` allows; raises `BadImage` as `image` does."""
        ...


def decoded(source: Source, index: int, reduction: Reduction) -> Decoded:
    """An image of any source, reduced where the source can do that."""
    if isinstance(source, Reducible):
        return source.reduced(index, reduction)
    image_CHW = source.image(index)
    return Decoded(image_CHW, image_CHW.shape[-2], image_CHW.shape[-1], 1)
