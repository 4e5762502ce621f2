"""From decoded images of any size to one batch of a fixed size, still 8-bit.

Normalization is done by the model: batches of bytes need a quarter of the memory and transfer.
Both transforms interpolate bilinearly with antialiasing, as in the literature's recipes
(it is RandomResizedCrop's default, which I-JEPA keeps). It costs the
same as bicubic, and it cannot overshoot, so no byte is clipped.

A training crop may be cut from an image decoded at reduced size. The reduction depends only on the
size of the image, and leaves the smallest possible crop at least `MARGIN` times the pixels needed,
so that interpolation can still antialias.

Suffixes: B images, C colours or random numbers, H and W pixels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dseqjepa.data.source import Decoded
from dseqjepa.keyed import Stream, uniforms

TRIES = 10
LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
# The random numbers of a sample: two per try, then top, left and flip.
DRAWS = 2 * TRIES + 3
RESIZE_RATIO = (256, 224)
MARGIN = 1.5
REDUCTIONS = (8, 4, 2)
"""The reductions that libjpeg offers."""

Mode = Literal["bilinear", "nearest-exact"]
Cut = Callable[[Decoded], UInt8[Tensor, "3 H W"]]


@runtime_checkable
class Transform(Protocol):
    """A pure function of an image, read with `reduction`, and its key."""

    image_size: tuple[int, int]

    def __call__(self, image: UInt8[Tensor, "3 h w"], key: int) -> UInt8[Tensor, "3 H W"]: ...

    def reduction(self, height: int, width: int) -> int:
        """The factor by which an image of this size may be decoded smaller: 1, 2, 4 or 8."""
        ...

    def cuts(self, keys_B: Int64[Tensor, " B"]) -> Sequence[Cut]:
        """The function to apply to the image of each key."""
        ...


class TrainTransform:
    """RandomResizedCrop, then a horizontal flip with probability one half if `flip` is set.

    Args:
        image_size: height and width of the result, in pixels.
        crop_scale: smallest and largest share of the image's area that a crop covers.
        flip: whether to flip half of the samples.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float] = (0.3, 1.0),
        flip: bool = False,
    ) -> None:
        self.image_size = image_size
        self.crop_scale = crop_scale
        self.flip = flip

    def __call__(self, image: UInt8[Tensor, "3 h w"], key: int) -> UInt8[Tensor, "3 H W"]:
        (cut,) = self.cuts(torch.tensor([key]))
        return cut(Decoded(image, image.shape[-2], image.shape[-1], 1))

    def reduction(self, height: int, width: int) -> int:
        low, _ = LOG_ASPECT
        smallest = math.sqrt(self.crop_scale[0] * height * width * math.exp(low))
        # If no crop fits, the fallback takes the whole shorter side.
        side = min(smallest, height, width) / (MARGIN * max(self.image_size))
        return next((by for by in REDUCTIONS if side >= by), 1)

    def cuts(self, keys_B: Int64[Tensor, " B"]) -> list[Cut]:
        # Drawn for the whole batch: numbers for one image cost as much as for a hundred.
        draws_BC = uniforms(keys_B, Stream.AUGMENT, DRAWS).tolist()
        return [partial(self._cut, draws) for draws in draws_BC]

    def _cut(self, draws: list[float], decoded: Decoded) -> Tensor:
        box = crop_box(draws, decoded.height, decoded.width, self.crop_scale)
        crop = resized_crop(decoded, box, self.image_size)
        return crop.flip(-1) if self.flip and draws[-1] < 0.5 else crop


class EvalTransform:
    """Resize so that the image just covers 256/224 of the target size, then crop the centre.

    An image that already has the target size is left unchanged.

    Args:
        image_size: height and width of the result, in pixels.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        self.image_size = image_size

    def __call__(self, image: UInt8[Tensor, "C h w"], key: int = 0) -> UInt8[Tensor, "C H W"]:
        return self._cut(image)

    def of_map(self, map_hw: Shaped[Tensor, "h w"]) -> Shaped[Tensor, "H W"]:
        """The same for a map of the image's pixels, without mixing values."""
        return self._cut(map_hw[None], "nearest-exact")[0]

    def _cut(self, image: Tensor, mode: Mode = "bilinear") -> Tensor:
        height, width = image.shape[-2:]
        if (height, width) == self.image_size:
            return image
        cover_height, cover_width = cover(self.image_size)
        if cover_height * width >= cover_width * height:
            size = cover_height, cover_height * width // height
        else:
            size = cover_width * height // width, cover_width
        return center_crop(resize(image, size, mode), self.image_size)

    def reduction(self, height: int, width: int) -> int:
        return 1

    def cuts(self, keys_B: Int64[Tensor, " B"]) -> list[Cut]:
        return [lambda decoded: self(decoded.image_CHW)] * len(keys_B)


def resize(
    image_CHW: Shaped[Tensor, "C h w"], size: tuple[int, int], mode: Mode = "bilinear"
) -> Shaped[Tensor, "C H W"]:
    """Resize bilinearly with antialiasing, or to the nearest pixel.

    Gives what torchvision's `resize` gives, with fewer copies. Bytes are the same on every CPU;
    torchvision rounds them differently without AVX2.
    """
    if image_CHW.shape[1:] == size:
        return image_CHW
    # A batch of one. Its stride lets torch see channels that lie side by side, as they are decoded:
    # that saves two copies.
    whole = max(map(operator.mul, image_CHW.shape, image_CHW.stride()))
    image_1CHW = image_CHW.as_strided((1, *image_CHW.shape), (whole, *image_CHW.stride()))
    if mode == "nearest-exact":
        exact = image_1CHW if image_CHW.dtype == torch.uint8 else image_1CHW.double()
        return F.interpolate(exact, size, mode=mode)[0].to(image_CHW.dtype)
    return F.interpolate(image_1CHW, size, mode=mode, align_corners=False, antialias=True)[0]


def center_crop(image_CHW: Shaped[Tensor, "C h w"], size: tuple[int, int]) -> Tensor:
    """The middle of an image that is at least this large."""
    top, left = (
        round((side - kept) / 2) for side, kept in zip(image_CHW.shape[-2:], size, strict=True)
    )
    return image_CHW[:, top : top + size[0], left : left + size[1]]


def cover(image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that a resized image covers before its centre is cut out."""
    grown, natural = RESIZE_RATIO
    height, width = (round(side * grown / natural) for side in image_size)
    return height, width


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


def resized_crop(decoded: Decoded, box: Box, size: tuple[int, int]) -> UInt8[Tensor, "3 H W"]:
    """Crop a box, given in the full image's pixels, and resize it bilinearly with antialiasing."""
    if decoded.reduction == 1:
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        return resize(decoded.image_CHW[:, rows, columns], size)
    # The box has fractional coordinates in the reduced image, which Pillow's resize (copied by
    # torch) supports.
    image = Image.fromarray(decoded.image_CHW.permute(1, 2, 0).numpy())
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    left, top, right, bottom = (corner / decoded.reduction for corner in corners)
    crop = image.resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


def crop_box(draws: Sequence[float], height: int, width: int, scale: tuple[float, float]) -> Box:
    """The box of RandomResizedCrop, as a function of `DRAWS` uniform numbers.

    The area is uniform in `scale`, the aspect ratio log-uniform in 3/4 to 4/3 and the position
    uniform (Szegedy et al., 2015, section 6). After `TRIES` crops that do not fit, the largest
    centred one with an allowed aspect ratio is used.
    """
    low, high = LOG_ASPECT
    for attempt in range(TRIES):
        area_draw, aspect_draw = draws[2 * attempt : 2 * attempt + 2]
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect_draw * (high - low))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[2 * TRIES] * (height - crop_height + 1))
            left = int(draws[2 * TRIES + 1] * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    crop_width = min(width, round(height * math.exp(high)))
    crop_height = min(height, round(width / math.exp(low)))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)
