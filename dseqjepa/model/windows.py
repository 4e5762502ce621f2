"""A window of each view for the context encoder, and target features at the window's patches.

Suffixes: B images, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from dseqjepa.keyed import Stream, uniforms


def draw_windows(keys_B: Int64[Tensor, " B"], area: float) -> Float[Tensor, "B 2 3"]:
    """Windows with the view's aspect covering `area` to 1 of it, uniform in size and position.

    Returned as affine maps from a window's coordinates to the view's, both from -1 to 1 (x first).
    """
    area_B, x_B, y_B = uniforms(keys_B, Stream.WINDOW, 3).float().unbind(1)
    side_B = (area + (1 - area) * area_B).sqrt()
    zero_B = torch.zeros_like(side_B)
    rows = [
        torch.stack([side_B, zero_B, (1 - side_B) * (2 * x_B - 1)], dim=1),
        torch.stack([zero_B, side_B, (1 - side_B) * (2 * y_B - 1)], dim=1),
    ]
    return torch.stack(rows, dim=1)


def sample_windows(
    maps_BCHW: Float[Tensor, "B C height width"], window_B23: Float[Tensor, "B 2 3"]
) -> Float[Tensor, "B C height width"]:
    """The windows of images or feature maps, resampled bilinearly to the full size.

    The same map serves both: pixel and patch centres are at the same fractions of a side.
    """
    maps_BCHW = maps_BCHW.float()
    with torch.autocast(maps_BCHW.device.type, enabled=False):  # some versions would round the grid
        grid = F.affine_grid(window_B23, list(maps_BCHW.shape), align_corners=False)
        return F.grid_sample(maps_BCHW, grid, padding_mode="border", align_corners=False)


def sample_tokens(
    x_BND: Float[Tensor, "B N D"], grid: tuple[int, int], window_B23: Float[Tensor, "B 2 3"]
) -> Float[Tensor, "B N D"]:
    """Features of the patches of a `grid` (rows, columns), at the patches of each window."""
    maps_BDHW = x_BND.transpose(1, 2).unflatten(2, grid)
    return sample_windows(maps_BDHW, window_B23).flatten(2).transpose(1, 2)
