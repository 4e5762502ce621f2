"""Bootstrap intervals: test images resampled with replacement.

Suffixes: N images, R resamples.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from dseqjepa.keyed import Stream, hash_int64

RESAMPLES = 1000


def draw_again(images: int, seed: int, resamples: int) -> Int64[Tensor, "R N"]:
    """The indices of each resample's images; a function of the seed."""
    generator = torch.Generator().manual_seed(int(hash_int64(seed, int(Stream.BOOTSTRAP))))
    return torch.randint(images, (resamples, images), generator=generator)


def resample_weights(images: int, seed: int) -> Float64[Tensor, "R N"]:
    """How often each image is drawn in each resample, so that a metric over weighted images can be
    computed for all resamples at once."""
    drawn_RN = draw_again(images, seed, RESAMPLES)
    weight_RN = torch.zeros(RESAMPLES, images, dtype=torch.float64)
    return weight_RN.scatter_add_(1, drawn_RN, torch.ones_like(drawn_RN, dtype=torch.float64))


def interval(values_R: Tensor) -> tuple[float, float]:
    """The middle 95 % of the resamples in which the metric is defined; NaN if it never is."""
    ends = torch.tensor([0.025, 0.975], dtype=values_R.dtype)
    low, high = values_R.nanquantile(ends).tolist()
    return low, high
