"""What every data set looks like to the rest: images by index, labels where there are some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

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
