"""The sheet of saliency and regions: its tiles lie where they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dseqjepa.errors import InputError
from dseqjepa.methods import build_method
from dseqjepa.model.look import look_for_saliency
from dseqjepa.plans.regions import rank_regions
from dseqjepa.viz.regions import draw_regions, regions_picture
from dseqjepa.viz.style import PAPER
from dseqjepa.viz.tiles import heat_tile, region_tile
from tests.tiny import tiny_config
from tests.viz.pages import Grid, make_ranks, without_numbers

MARGIN, GAP = 24, 6  # of the default cell of 192 pixels


def make_batch(grid: Grid, images: int, side: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images)
    shape = (images, 3, side * grid[0], side * grid[1])
    images_BCHW = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    saliency_BN = torch.randn(images, grid[0] * grid[1], generator=generator)
    rank_BN = torch.stack(
        [torch.from_numpy(make_ranks(grid, 4, seed).flatten()) for seed in range(images)]
    )
    return images_BCHW, saliency_BN, rank_BN


@pytest.mark.parametrize(
    ("grid", "images", "columns", "size"),
    [
        ((8, 8), 12, 3, (3 * (3 * 192 + 2 * GAP), 4 * 192)),
        ((8, 8), 7, 3, (3 * (3 * 192 + 2 * GAP), 3 * 192)),
        ((8, 8), 2, 3, (2 * (3 * 192 + 2 * GAP), 192)),
        ((4, 12), 3, 1, (3 * 192 + 2 * GAP, 3 * 64)),
        ((12, 4), 1, 1, (3 * 64 + 2 * GAP, 192)),
    ],
)
def test_a_sheet_is_its_tiles_and_margins(
    grid: Grid, images: int, columns: int, size: tuple[int, int]
) -> None:
    across, down = min(columns, images), -(-images // columns)
    sheet = draw_regions(*make_batch(grid, images), grid, columns=columns)
    assert sheet.size == (size[0] + (across + 1) * MARGIN, size[1] + (down + 2) * MARGIN)


def test_tiles_lie_where_they_should_in_the_order_of_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_numbers(monkeypatch)
    images_BCHW, saliency_BN, rank_BN = make_batch((6, 8), 5)
    sheet = np.asarray(draw_regions(images_BCHW, saliency_BN, rank_BN, (6, 8), columns=2))
    paper_HW = (sheet == PAPER).all(axis=-1)
    for number in range(5):
        image_HW3 = images_BCHW[number].permute(1, 2, 0).numpy()
        photo = Image.fromarray(image_HW3).resize((192, 144), Image.Resampling.LANCZOS)
        left = MARGIN + number % 2 * (3 * 192 + 2 * GAP + MARGIN)
        top = 2 * MARGIN + number // 2 * (144 + MARGIN)
        tiles = [
            photo,
            heat_tile(photo, saliency_BN[number].double().numpy().reshape(6, 8)),
            region_tile(photo, rank_BN[number].numpy().reshape(6, 8)),
        ]
        for part, tile in enumerate(tiles):
            x = left + part * (192 + GAP)
            np.testing.assert_array_equal(sheet[top : top + 144, x : x + 192], np.asarray(tile))
            paper_HW[top : top + 144, x : x + 192] = True
    assert paper_HW.all()


def test_the_same_input_gives_the_same_bytes() -> None:
    one, two = (draw_regions(*make_batch((5, 9), 3), (5, 9)) for _ in range(2))
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize(("class_token", "kind"), [(True, "cls_similarity"), (False, "grad_cam")])
def test_a_picture_shows_what_the_encoder_finds_salient(class_token: bool, kind: str) -> None:
    method = build_method(
        tiny_config(
            "dseq_vitt8_64", "data.image_size=[48,64]", "model.depth=3",
            f"model.class_token={class_token}", f"method.saliency.kind={kind}",
            "method.regions.kind=components", "method.regions.count=3",
            "method.regions.min_area=0.02",
        )
    )  # fmt: skip
    images_BCHW, _, _ = make_batch((6, 8), 2, side=8)
    saliency_BN = look_for_saliency(method.target, images_BCHW, kind=kind).saliency_BN
    assert saliency_BN is not None
    rank_BN = rank_regions(saliency_BN, (6, 8), 3, 0.02).rank_BN
    assert rank_BN.max() > 0
    picture = regions_picture(method, images_BCHW, torch.arange(2))
    assert picture.tobytes() == draw_regions(images_BCHW, saliency_BN, rank_BN, (6, 8)).tobytes()


def test_what_cannot_be_drawn_is_named() -> None:
    images_BCHW, saliency_BN, rank_BN = make_batch((4, 4), 2)
    with pytest.raises(InputError, match=r"saliency of 2 images on a 4 x 5 grid must be \(2, 20\)"):
        draw_regions(images_BCHW, saliency_BN, rank_BN, (4, 5))
    with pytest.raises(InputError, match="non-finite"):
        draw_regions(images_BCHW, saliency_BN / 0, rank_BN, (4, 4))
    with pytest.raises(InputError, match="found none"):
        draw_regions(images_BCHW[:0], saliency_BN[:0], rank_BN[:0], (4, 4))
