"""A trained encoder as people hold it: whatever an image is, it can be brought to it.

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
    """A `VisionTransformer` that prepares its own images."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the positions are stored for."""
        rows, columns = self.grid
        return rows * self.patch_size, columns * self.patch_size

    def preprocess(
        self, images: AnyImage | Sequence[AnyImage], image_size: tuple[int, int] | None = None
    ) -> UInt8[Tensor, "B 3 H W"]:
        """One image or several, of any and of mixed sizes, as the encoder takes them: bytes, on its
        device.

        Each is resized to just cover 256/224 of `image_size` (that of the pre-training, if not
        given), and its centre is cut out, as evaluations do it.

        Raises:
            ValueError: what is no image, or has no pixels of bytes.
        """
        single = isinstance(images, Image.Image) or (
            isinstance(images, np.ndarray | Tensor) and images.ndim <= 3
        )
        several: Any = [images] if single else images
        transform = EvalTransform(image_size or self.image_size)
        tensors = [transform(as_bytes(image)) for image in several]
        if not tensors:
            raise ValueError("expected an image, found none")
        return torch.stack(tensors).to(self.pos_embed.device)
