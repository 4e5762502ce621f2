"""Samples for segmentation: images with label maps of the same size.

Training: a random scale, a crop that no class fills, a flip, photometric distortion, as in mmseg's
pipeline for ADE20K. Suffixes: C colours, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pad_image

from dseqjepa.data.source import BadImage, Segmentations
from dseqjepa.data.transforms import resize
from dseqjepa.tasks.reading import seeded

CROP_TRIES = 10
MOST_OF_ONE_CLASS = 0.75
"""A crop in which one class covers more than this is redrawn, up to a number of tries."""


class Distortion(v2.RandomPhotometricDistort):
    """Without torchvision's permutation of the colours, which mmseg does not have."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


DISTORTION = Distortion(
    brightness=(1 - 32 / 255, 1 + 32 / 255), contrast=(0.5, 1.5), saturation=(0.5, 1.5),
    hue=(-0.05, 0.05), p=0.5,
)  # fmt: skip
"""Brightness, contrast, saturation and hue, each applied to half of the images."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """An image with the class of every pixel, 0 where it is to be ignored."""

    image_CHW: Tensor
    label_HW: Tensor


def read_labelled(source: Segmentations, index: int) -> Labelled:
    """Raises `BadImage` if either cannot be read or their sizes differ."""
    image_CHW, label_HW = source.image(index), source.label_map(index)
    if image_CHW.shape[-2:] != label_HW.shape:
        raise BadImage(
            f"image of {tuple(image_CHW.shape[-2:])} and labels of {tuple(label_HW.shape)} pixels"
        )
    return Labelled(image_CHW, label_HW)


def scaled_size(height: int, width: int, scale: tuple[int, int], factor: float) -> tuple[int, int]:
    """The largest size of this aspect inside `factor` times `scale` (longer side, shorter side)."""
    longer, shorter = max(height, width), min(height, width)
    by = factor * min(max(scale) / longer, min(scale) / shorter)
    return max(round(height * by), 1), max(round(width * by), 1)


@dataclass(frozen=True)
class TrainCrops:
    """A sample's augmentation, a pure function of the two maps and a key.

    Args:
        size: side of the crops in pixels.
        scale: (longer, shorter) side that an image is fitted into before it is scaled.
        factors: the smallest and largest further scaling.
        fill: colour (3 bytes) of the part of a crop outside the image.
    """

    size: int
    scale: tuple[int, int]
    factors: tuple[float, float]
    fill: tuple[int, int, int]

    def __call__(self, sample: Labelled, key: int) -> Labelled:
        with seeded(key):
            return self._drawn(sample)

    def _drawn(self, sample: Labelled) -> Labelled:
        low, high = self.factors
        factor = low + (high - low) * torch.rand(()).item()
        height, width = sample.label_HW.shape
        size = scaled_size(height, width, self.scale, factor)
        label_HW = resize(sample.label_HW[None], size, "nearest-exact")[0]
        top, left = self._place(label_HW)
        label_HW = label_HW[top : top + self.size, left : left + self.size]
        image_CHW = resize(sample.image_CHW, size)
        image_CHW = image_CHW[:, top : top + self.size, left : left + self.size]
        if torch.rand(()) < 0.5:
            image_CHW, label_HW = image_CHW.flip(-1), label_HW.flip(-1)
        image_CHW = DISTORTION(image_CHW)
        return Labelled(*padded(image_CHW, label_HW, self.size, self.fill))

    def _place(self, label_HW: Tensor) -> tuple[int, int]:
        for _ in range(CROP_TRIES):
            top, left = (
                int(torch.rand(()).item() * (max(side - self.size, 0) + 1))
                for side in label_HW.shape
            )
            crop_HW = label_HW[top : top + self.size, left : left + self.size]
            count_K = crop_HW[crop_HW > 0].bincount()
            if (count_K > 0).sum() > 1 and count_K.max() < MOST_OF_ONE_CLASS * count_K.sum():
                break
        return top, left


def padded(
    image_CHW: Tensor, label_HW: Tensor, size: int, fill: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Padded at the right and bottom to at least `size`, with a colour and label 0."""
    height, width = label_HW.shape
    edges = [0, 0, max(size - width, 0), max(size - height, 0)]  # left, top, right, bottom
    image_CHW = pad_image(image_CHW, edges, fill=list(fill))
    return image_CHW.contiguous(), pad_image(label_HW[None], edges)[0].contiguous()
