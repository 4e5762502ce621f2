"""Sliding-window inference: logits of an image of any size from a model with a fixed size.

Suffixes: C colours, K classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 8
"""Number of windows per forward pass."""


def starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Offsets of windows along a side: every stride, with the last one moved back to fit."""
    count = max(-(-(length - window) // stride), 0) + 1
    for number in range(count):
        yield max(min(number * stride, length - window), 0)


def sliding_logits(
    model: Callable[[Tensor], Tensor], image_CHW: Tensor, window: int, stride: int
) -> Tensor:
    """Mean over all windows of a pixel's logits (K, H, W), float32.

    Args:
        model: (B, C, window, window) normalized images to (B, K, window, window) logits.
        image_CHW: a normalized image, padded with zeros at the right and bottom if it is smaller
            than a window.
    """
    height, width = image_CHW.shape[-2:]
    more_high, more_wide = max(window - height, 0), max(window - width, 0)
    image_CHW = F.pad(image_CHW, (0, more_wide, 0, more_high))
    grown = image_CHW.shape[-2:]
    corners = [
        (top, left)
        for top in starts(grown[0], window, stride)
        for left in starts(grown[1], window, stride)
    ]
    total_KHW: Tensor | None = None
    count_HW = image_CHW.new_zeros(grown)
    for first in range(0, len(corners), AT_ONCE):
        part = corners[first : first + AT_ONCE]
        cut = [image_CHW[:, top : top + window, left : left + window] for top, left in part]
        logits_BKHW = model(torch.stack(cut)).float()
        if total_KHW is None:
            total_KHW = logits_BKHW.new_zeros(logits_BKHW.shape[1], *grown)
        for (top, left), logits_KHW in zip(part, logits_BKHW, strict=True):
            total_KHW[:, top : top + window, left : left + window] += logits_KHW
            count_HW[top : top + window, left : left + window] += 1
    assert total_KHW is not None
    return (total_KHW / count_HW)[:, :height, :width]
