"""The objects of an image at patch resolution.

Suffixes: C colours, H and W pixels, O objects of one image, B images, P patches of a grid
(row-major), h and w its rows and columns, L layers of one image, 4 (top, left, bottom, right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from dseqjepa.data.source import BadImage, Located
from dseqjepa.data.transforms import EvalTransform

MOST = 0.5
"""An object patch is covered by objects to more than this share."""


@dataclass(frozen=True, eq=False)
class LocatedImage:
    """An image as the encoder sees it, and shares of its patches: `known_P`, for which the truth is
    known; `cover_P`, covered by any object; `main_P`, covered by the largest. `boxes_O4` are the
    objects' boxes in patches."""

    image_CHW: UInt8[Tensor, "3 H W"]
    known_P: Float[Tensor, " P"]
    cover_P: Float[Tensor, " P"]
    main_P: Float[Tensor, " P"]
    boxes_O4: Float[Tensor, "O 4"]


def read_sample(
    source: Located, index: int, image_size: tuple[int, int], grid: tuple[int, int]
) -> LocatedImage:
    """An image and its objects, both resized to `image_size` by the same `EvalTransform`.

    Raises:
        BadImage: it cannot be decoded, or its objects refer to another size.
    """
    found, image_CHW = source.objects(index), source.image(index)
    if image_CHW.shape[-2:] != found.known_HW.shape:
        raise BadImage(
            f"image of {tuple(image_CHW.shape[-2:])} and objects of {tuple(found.known_HW.shape)} "
            "pixels"
        )
    masks_OHW = found.masks_KHW & found.known_HW
    layers_LHW = torch.cat([torch.stack([found.known_HW, masks_OHW.any(0)]), masks_OHW])
    transform = EvalTransform(image_size)
    share_LHW = transform(255 * layers_LHW.to(torch.uint8)).float() / 255
    share_LP = F.adaptive_avg_pool2d(share_LHW, grid).flatten(1)
    objects_OP = share_LP[2:]
    largest = objects_OP.sum(1).argmax() if len(objects_OP) else None
    return LocatedImage(
        transform(image_CHW),
        share_LP[0],
        share_LP[1],
        torch.zeros_like(share_LP[0]) if largest is None else objects_OP[largest],
        _boxes(share_LHW[2:] > MOST, grid),
    )


def _boxes(masks_OHW: Bool[Tensor, "_ H W"], grid: tuple[int, int]) -> Float[Tensor, "O 4"]:
    """Tight boxes, in patches, of the objects still visible after the transform."""
    boxes = []
    scale_2 = torch.tensor(grid) / torch.tensor(masks_OHW.shape[1:])
    for mask_HW in masks_OHW:
        seen_N2 = mask_HW.nonzero()
        if len(seen_N2):
            boxes.append(torch.cat([seen_N2.amin(0) * scale_2, (seen_N2.amax(0) + 1) * scale_2]))
    return torch.stack(boxes) if boxes else torch.zeros(0, 4)


@dataclass(frozen=True, eq=False)
class Truth:
    """The shares of a batch of samples, and derived values."""

    known_BP: Float[Tensor, "B P"]
    cover_BP: Float[Tensor, "B P"]
    main_BP: Float[Tensor, "B P"]
    boxes: list[Float[Tensor, "_ 4"]]

    @classmethod
    def of(cls, samples: Sequence[LocatedImage]) -> Truth:
        return cls(
            torch.stack([sample.known_P for sample in samples]),
            torch.stack([sample.cover_P for sample in samples]),
            torch.stack([sample.main_P for sample in samples]),
            [sample.boxes_O4 for sample in samples],
        )

    @property
    def judged_BP(self) -> Bool[Tensor, "B P"]:
        return self.known_BP > MOST

    @property
    def object_BP(self) -> Bool[Tensor, "B P"]:
        """Patches in which objects cover more than half of the known area."""
        return self.judged_BP & (self.cover_BP > MOST * self.known_BP)
