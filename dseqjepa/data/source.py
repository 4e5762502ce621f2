"""The interface of all data sets: images by index, and their annotations.

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
"""The images for pre-training, and for training and testing evaluations. "pretrain" equals "train",
except for data sets with unlabelled images."""


@runtime_checkable
class Source(Protocol):
    """A fixed list of images.

    `labels` maps a task ("class", "count", ...) to one int64 label per image, `classes` the same
    task to the names of its labels. Both are empty if the data has no labels.
    """

    labels: Mapping[str, np.ndarray]
    classes: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """The image as uint8 [3, H, W]; raises `BadImage` if it cannot be decoded."""
        ...

    def name(self, index: int) -> str:
        """A readable name of this image: a path, or a number."""
        ...

    def fingerprint(self) -> str:
        """A cheap hash that changes with the list of images; it does not read pixels."""
        ...


@dataclass(frozen=True, eq=False)
class Instances:
    """The objects of one image, in the order of the annotations.

    `boxes_K4` is (x0, y0, x1, y1) in pixels, its end exclusive. `label_K` is 1-based and without
    gaps: label i is `Detections.categories[i - 1]`. `crowd_K` marks regions with many objects,
    which are neither trained on nor scored. `area_K` is that of the annotations, in pixels.
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
    """Images with annotated objects: class, box and mask.

    `categories` are the names, index 0 being label 1; `category_ids` the annotations' own numbers
    in the same order; `annotations` the annotation file in COCO's format.
    """

    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    annotations: Path

    def instances(self, index: int) -> Instances:
        """The objects of an image, in its own pixels; K = 0 if there are none."""
        ...

    def labels_of(self, index: int) -> Int64[Tensor, " K"]:
        """Only the `label_K` of an image's objects, which is fast."""
        ...


@runtime_checkable
class Segmentations(Source, Protocol):
    """Images with a class for every pixel; `categories` at index 0 is label 1."""

    categories: tuple[str, ...]

    def label_map(self, index: int) -> Int64[Tensor, "H W"]:
        """The class of every pixel, 1 to C; 0 is ignored. Raises `BadImage` like `image`."""
        ...


@runtime_checkable
class Depths(Source, Protocol):
    """Images with the depth of every pixel."""

    def depth_map(self, index: int) -> Float32[Tensor, "H W"]:
        """Depth along the optical axis, in the source's own unit; inf where it is not scored.
        Raises `BadImage` like `image`."""
        ...


@dataclass(frozen=True, eq=False)
class Objects:
    """The location of an image's objects, without their classes.

    `known_HW` is false where the annotations do not separate object and background: at the rim of
    an outline, in a crowd, at unlabelled pixels.
    """

    masks_KHW: Bool[Tensor, "K H W"]
    known_HW: Bool[Tensor, "H W"]


@runtime_checkable
class Located(Source, Protocol):
    """Images with object masks or boxes."""

    located_by: Literal["masks", "boxes"]

    def objects(self, index: int) -> Objects:
        """The objects of an image, in its own pixels; boxes are filled. `BadImage` like `image`."""
        ...


@runtime_checkable
class Sharded(Source, Protocol):
    """Images stored consecutively in shards; `counts` gives the number in each."""

    counts: Sequence[int]

    def check_window(self, window: int) -> None:
        """`InputError` where images cannot be read in an order that shuffles `window` of the files
        at a time; all of them, if 0."""
        ...


class BadImage(Exception):
    """An image that cannot be decoded. The message contains the reason, not the name."""


Reduction = Callable[[int, int], int]
"""Height and width of an image -> 1, 2, 4 or 8, the factor by which it may be decoded smaller."""


class Decoded(NamedTuple):
    """An image, decoded `reduction` times smaller than its `height` and `width` (rounded up)."""

    image_CHW: Tensor
    height: int
    width: int
    reduction: int


@runtime_checkable
class Reducible(Protocol):
    """An optional ability of a source: decoding an image smaller, if that is cheaper."""

    def reduced(self, index: int, reduction: Reduction) -> Decoded:
        """The image, no smaller than `reduction` allows; raises `BadImage` like `image`."""
        ...


def decoded(source: Source, index: int, reduction: Reduction) -> Decoded:
    """An image of any source, reduced if the source supports it."""
    if isinstance(source, Reducible):
        return source.reduced(index, reduction)
    image_CHW = source.image(index)
    return Decoded(image_CHW, image_CHW.shape[-2], image_CHW.shape[-1], 1)
