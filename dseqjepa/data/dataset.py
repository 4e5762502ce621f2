"""Images from Python: single images of any type, and torch Datasets.

Suffixes: H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dseqjepa.errors import InputError

AnyImage = Image.Image | np.ndarray | Tensor
"""A Pillow image, an array [H, W, 3] or [H, W] of bytes, or a tensor [3, H, W] of bytes."""


def as_bytes(image: Any) -> UInt8[Tensor, "3 H W"]:
    """An `AnyImage` as a tensor; `ValueError` for anything else."""
    found = image
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if isinstance(image, np.ndarray) and image.ndim == 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    is_image = isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3
    if not is_image or image.dtype != torch.uint8 or not image.numel():
        shape, kind = tuple(getattr(found, "shape", ())), getattr(found, "dtype", type(found))
        raise ValueError(
            "expected a Pillow image, bytes [H, W, 3] in NumPy or bytes [3, H, W] in torch, "
            f"found {kind} {shape}"
        )
    return image


class DatasetSource:
    """A torch Dataset with a length as a `Source`: items are images, or tuples starting with one.

    Images must be uncropped and 8-bit: the training does cropping and normalization. The rest of an
    item is ignored. `InputError` if the data set has no length, or no images.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        if not hasattr(dataset, "__len__") or not len(dataset):
            raise InputError(f"expected a data set with a length and images, found {dataset!r}")
        self.dataset: Any = dataset
        self.labels: Mapping[str, np.ndarray] = {}
        self.classes: Mapping[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> UInt8[Tensor, "3 H W"]:
        item = self.dataset[index]
        return as_bytes(item[0] if isinstance(item, tuple | list) else item)

    def name(self, index: int) -> str:
        return f"item {index}"

    def fingerprint(self) -> str:
        """Type and length of the data set: more is not known without reading it."""
        kind = f"{type(self.dataset).__module__}.{type(self.dataset).__qualname__}"
        return hashlib.sha256(f"{kind} {len(self)}".encode()).hexdigest()
