"""What every data set looks like to the rest: images by index, and what is known about them.

Suffixes: K objects of one image, C colours, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

Split = Literal["pretrain", "train", "val"]
"""The images to pre-train on, to train an evaluation on, and to test it on. The first are those of
"train", but for a data set that has images for it without labels."""


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


@dataclass(frozen=True, eq=False)
class Instances:
    """The objects of one image, in the order of the annotations.

    `boxes_K4` is (x0, y0, x1, y1) in pixels, its end exclusive. `label_K` is 1-based and without
    gaps: label i is `Detections.categories[i - 1]`. `crowd_K` marks regions that hold many objects
    and are neither to be learnt nor to be found. `area_K` is the annotations' own, in pixels.
    `image_id` is the annotations' number of the image.
    """

    boxes_K4: Float32[Tensor, "K 4"]
    label_K: Int64[Tensor, " K"]
    masks_KHW: Bool[Tensor, "K H W"]
    crowd_K: Bool[Tensor, " K"]
    area_K: Float32[Tensor, " K"]
    image_id: int


@runtime_checkable
class Detections(Source, Protocol):
    """Images whose objects are known, each with its class, box and mask.

    `categories` are the names, index 0 being label 1; `category_ids` the annotations' own numbers
    in the same order; `annotations` the file in COCO's format that says all this.
    """

    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    annotations: Path

    def instances(self, index: int) -> Instances:
        """The objects of an image, in its own pixels; none is K = 0."""
        ...

    def labels_of(self, index: int) -> Int64[Tensor, " K"]:
        """The `label_K` of an image's objects alone, which takes no time."""
        ...


@runtime_checkable
class Segmentations(Source, Protocol):
    """Images of which every pixel's class is known; `categories` at index 0 is label 1."""

    categories: tuple[str, ...]

    def label_map(self, index: int) -> Int64[Tensor, "H W"]:
        """The class of every pixel, 1 to C; 0 is to be ignored. Raises `BadImage` as `image`."""
        ...


@runtime_checkable
class Depths(Source, Protocol):
    """Images of which every pixel's distance from the camera is known."""

    def depth_map(self, index: int) -> Float32[Tensor, "H W"]:
        """Along the optical axis, in the source's own unit; inf where it is not to be judged.
        Raises `BadImage` as `image`."""
        ...


@dataclass(frozen=True, eq=False)
class Objects:
    """Where the objects of an image are, and nothing about what they are.

    `known_HW` is false where the annotations do not tell object from background: at the rim of an
    outline, in a crowd, where a pixel has no label.
    """

    masks_KHW: Bool[Tensor, "K H W"]
    known_HW: Bool[Tensor, "H W"]


@runtime_checkable
class Located(Source, Protocol):
    """Images of which it is known where the objects are, by their masks or by their boxes."""

    located_by: Literal["masks", "boxes"]

    def objects(self, index: int) -> Objects:
        """The objects of an image, in its own pixels; boxes are filled. `BadImage` as `image`."""
        ...


@runtime_checkable
class Sharded(Source, Protocol):
    """Images that lie in files of many, one after the other; `counts` says how many in each."""

    counts: Sequence[int]

    def check_window(self, window: int) -> None:
        """`InputError` where images cannot be read in an order that shuffles `window` of the files
        at a time; all of them, if 0."""
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
