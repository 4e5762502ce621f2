"""Windows lie within the view, and samples lie where the window says.

Suffixes: B images, C channels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dseqjepa.model.windows import draw_windows, sample_tokens, sample_windows

KEYS = torch.arange(2000)


def ramps(height: int, width: int) -> Tensor:
    """Where each cell's centre is, x and y from -1 to 1: (1, 2, height, width)."""
    x = (2 * torch.arange(width) + 1) / width - 1
    y = (2 * torch.arange(height) + 1) / height - 1
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


@pytest.mark.parametrize("area", [0.1, 0.5, 0.9])
def test_windows_lie_inside_and_hold_the_share_that_was_asked_for(area: float) -> None:
    window_B23 = draw_windows(KEYS, area)
    side_B, shift_B2 = window_B23[:, 0, 0], window_B23[:, :, 2]
    assert torch.equal(side_B, window_B23[:, 1, 1])
    assert not window_B23[:, [0, 1], [1, 0]].any()
    assert (shift_B2.abs() + side_B[:, None] <= 1 + 1e-6).all()
    share_B = side_B.square()
    assert area - 1e-6 <= share_B.min() < area + 0.01
    assert 0.99 < share_B.max() <= 1
    assert share_B.mean() == pytest.approx((1 + area) / 2, abs=0.02)
    assert (shift_B2.abs() / (1 - side_B[:, None])).mean() == pytest.approx(0.5, abs=0.02)
    places_2B = (shift_B2 / (1 - side_B[:, None])).T
    assert torch.corrcoef(torch.cat([places_2B, side_B[None]])).triu(1).abs().max() < 0.1
    assert torch.equal(draw_windows(KEYS[5:9], area), window_B23[5:9])


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_images_and_features_are_sampled_at_the_same_places(size: tuple[int, int]) -> None:
    window_B23 = draw_windows(KEYS[:50], 0.3)
    grid = (size[0] // 8, size[1] // 8)
    pixels_BCHW = sample_windows(ramps(*size).expand(50, -1, -1, -1), window_B23)
    tokens_BND = sample_tokens(
        ramps(*grid).flatten(2).transpose(1, 2).expand(50, -1, -1), grid, window_B23
    )
    right_BCHW = ramps(*grid) * window_B23[:, 0, 0].reshape(-1, 1, 1, 1)
    right_BCHW = right_BCHW + window_B23[:, :, 2, None, None]
    # Beyond the outermost centres the border is repeated.
    for found_BCHW, (height, width) in (
        (tokens_BND.transpose(1, 2).unflatten(2, grid), grid),
        (torch.nn.functional.avg_pool2d(pixels_BCHW, 8), size),
    ):
        limit_C11 = torch.tensor([1 - 1 / width, 1 - 1 / height])[:, None, None]
        near_BCHW = found_BCHW - right_BCHW.clamp(-limit_C11, limit_C11)
        assert near_BCHW.abs().max() < (1e-5 if (height, width) == grid else 2e-3)


def test_where_centres_meet_features_are_those_of_the_whole() -> None:
    x_BND = torch.randn(3, 54, 5, generator=torch.Generator().manual_seed(0))
    third = torch.tensor([[1 / 3, 0.0, 0.0], [0.0, 1 / 3, 0.0]]).expand(3, 2, 3)
    found = sample_tokens(x_BND, (6, 9), third).unflatten(1, (6, 9))
    right = x_BND.unflatten(1, (6, 9))[:, 2:4, 3:6]
    torch.testing.assert_close(found[:, 1::3, 1::3], right)
