"""The discovery sheet shows each map and numbered regions, legibly."""

from __future__ import annotations

import numpy as np
import torch

from dseqjepa.config import CutConfig
from dseqjepa.viz.discovery import discovery_sheet
from tests.viz.pages import assert_legible, make_ranks, small_images, words

GRID = (4, 6)
MAPS = ("cls_similarity", "cls_attention", "grad_cam", "rarity", "pixels")
KINDS = ("components", "clusters", "bands")


def test_every_map_and_every_region_is_on_the_sheet() -> None:
    images = small_images(3, (32, 48))
    generator = torch.Generator().manual_seed(0)
    ranks = [
        {
            kind: torch.from_numpy(make_ranks(GRID, 3 + k, seed=n)).flatten()
            for k, kind in enumerate(KINDS)
        }
        for n in range(3)
    ]
    examples = [
        (
            f"picture {n}", images[n], torch.rand(24, generator=generator),
            {kind: torch.randn(24, generator=generator) for kind in MAPS}, ranks[n],
        )
        for n in range(3)
    ]  # fmt: skip
    figure = discovery_sheet(examples, GRID, CutConfig())
    assert_legible(figure)
    said = words(figure)
    assert {"image", "objects", "rarity", "pixels", "Grad-CAM", *KINDS} <= set(said)
    tiles = [axes for axes in figure.axes if axes.images]
    assert len(tiles) == 3 * (2 + len(MAPS) + len(KINDS))
    for n in range(3):
        row = tiles[10 * n : 10 * n + 10]
        for axes, kind in zip(row[-3:], KINDS, strict=True):
            numbers = sorted(int(text.get_text()) for text in axes.texts)
            assert numbers == [rank + 1 for rank in np.unique(ranks[n][kind])]
