"""A trained encoder that accepts images of any type and size.

Suffixes: B images, C colours, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dseqjepa.data.dataset import AnyImage, as_bytes
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.model.vit import VisionTransformer


class TrainedEncoder(VisionTransformer):
    """A `VisionTransformer` that preprocesses its own images."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels for which the positions are stored."""
        rows, columns = self.grid
        return rows * self.patch_size, columns * self.patch_size

    def preprocess(
        self, images: AnyImage | Sequence[AnyImage], image_size: tuple[int, int] | None = None
    ) -> UInt8[Tensor, "B 3 H W"]:
        """Prepare one or several images of any, even mixed, sizes as bytes on the encoder's device.

        Each is resized to just cover 256/224 of `image_size` (by default that of pre-training) and
        centre-cropped, as in evaluations.

        Raises:
            ValueError: not an image, or not of bytes.
        """
        single = isinstance(images, Image.Image) or (
            isinstance(images, np.ndarray | Tensor) and images.ndim <= 3
        )
        several: Any = [images] if single else images
        transform = EvalTransform(image_size or self.image_size)
        tensors = [transform(as_bytes(image)) for image in several]
        if not tensors:
            raise ValueError("expected at least one image, found none")
        return torch.stack(tensors).to(self.pos_embed.device)
