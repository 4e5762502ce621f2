"""Tiny configs and images that the tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.presets import load_config

TINY = (
    "data.image_size=32",
    "data.batch_size=8",
    "data.workers=0",
    "model.name=vit_nano",
    "model.patch_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "predictor.width=16",
    "predictor.depth=1",
    "predictor.heads=2",
    "runtime.accelerator=cpu",
    "runtime.precision=fp32",
)


PAPER = (
    "method.saliency.kind=cls_similarity",
    "method.regions.kind=components",
    "method.regions.min_area=0.05",
    "method.regularizer_over=pooled",
)
"""What turns the small presets' regions and regularizer into the paper's and C-JEPA's."""


def tiny_config(preset: str = "dseq_vitt8_64", *overrides: str) -> Config:
    """A preset shrunk to a model that takes milliseconds, at 32 px on a 4 x 4 grid."""
    return load_config(preset, [*TINY, *overrides])


def float_images(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    """Smooth random images, float and taken as normalized."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
