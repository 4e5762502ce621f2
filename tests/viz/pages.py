"""Shared by the picture tests: rank maps, small images, and checks that a page is legible."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import ImageDraw
from torch import Tensor

from dseqjepa.viz.canvas import Figure

Grid = tuple[int, int]
GRIDS = [(8, 8), (5, 9), (12, 4), (1, 6)]


def make_ranks(grid: Grid, count: int, seed: int) -> NDArray[np.int64]:
    """A random map of exactly `count` ranks, from scattered patches to a few lumps."""
    generator = np.random.default_rng(seed)
    seeds_KX = generator.integers(0, grid, (count + seed % 4 * 3, 2))
    cell_hwX = np.moveaxis(np.indices(grid), 0, -1)
    away_hwK = ((cell_hwX[:, :, None] - seeds_KX) ** 2).sum(axis=-1)
    rank_hw = away_hwK.argmin(axis=-1) % count
    rank_hw.flat[generator.permutation(rank_hw.size)[:count]] = np.arange(count)
    return rank_hw


def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *_args, **_settings: None)


def small_images(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    """Smooth random 8-bit images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    large = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (large * 255).to(torch.uint8)


def words(figure: Figure) -> list[str]:
    """Every text of a figure that is drawn."""
    return [text.get_text() for text in drawn(figure)]


def drawn(figure: Figure) -> list[Text]:
    """The texts of pages, tiles and charts; ticks lie within the limits of their axis, or are not
    drawn."""
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += axes.texts
        if axes.get_legend() is not None:
            texts += axes.get_legend().get_texts()
        if axes.axison:
            texts += [axes.xaxis.label, axes.yaxis.label]
            for labels, limits, axis in (
                (axes.get_xticklabels(), axes.get_xlim(), 0),
                (axes.get_yticklabels(), axes.get_ylim(), 1),
            ):
                low, high = sorted(limits)
                texts += [text for text in labels if low <= text.get_position()[axis] <= high]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def assert_legible(figure: Figure) -> None:
    """No text is cut off at the edge of the page, too small, or written over another."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw(renderer)
    page = figure.bbox
    placed = [(text, text.get_window_extent(renderer)) for text in drawn(figure)]
    for text, box in placed:
        assert text.get_fontsize() >= 7, text
        assert box.x0 >= page.x0, text
        assert box.x1 <= page.x1, text
        assert box.y0 >= page.y0, text
        assert box.y1 <= page.y1, text
    for (one, box), (other, box2) in combinations(placed, 2):
        wide = min(box.x1, box2.x1) - max(box.x0, box2.x0)
        high = min(box.y1, box2.y1) - max(box.y0, box2.y0)
        assert wide <= 1 or high <= 2, f"{one} is written over {other}"
