"""The picture says what the ranks say: one colour a rank, borders between ranks, numbers inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage.color import rgb2lab
from torch import Tensor

from dseqjepa.errors import InputError
from dseqjepa.model.look import look_for_saliency
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.plans.regions import rank_regions
from dseqjepa.viz.regions import (
    BORDER,
    HEAT,
    PALETTE,
    PAPER,
    draw_regions,
    heat_tile,
    label_patch,
    region_tile,
    regions_picture,
)

Grid = tuple[int, int]
GRIDS = [(8, 8), (5, 9), (12, 4), (1, 6)]
MARGIN, GAP = 24, 6  # of the default cell of 192 pixels


def make_ranks(grid: Grid, count: int, seed: int) -> NDArray[np.int64]:
    """A random map of exactly `count` ranks, from scattered patches to a few lumps."""
    generator = np.random.default_rng(seed)
    seeds_KX = generator.integers(0, grid, (count + seed % 4 * 3, 2))
    cell_hwX = np.moveaxis(np.indices(grid), 0, -1)
    away_hwK = ((cell_hwX[:, :, None] - seeds_KX) ** 2).sum(axis=-1)
    rank_hw = away_hwK.argmin(axis=-1) % count
    rank_hw.flat[generator.permutation(rank_hw.size)[:count]] = np.arange(count)
    return rank_hw


def make_batch(grid: Grid, images: int, side: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images)
    shape = (images, 3, side * grid[0], side * grid[1])
    images_BCHW = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    saliency_BN = torch.randn(images, grid[0] * grid[1], generator=generator)
    rank_BN = torch.stack(
        [torch.from_numpy(make_ranks(grid, 4, seed).flatten()) for seed in range(images)]
    )
    return images_BCHW, saliency_BN, rank_BN


def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *_args, **_settings: None)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_every_rank_has_a_colour_and_every_step_between_ranks_a_border(
    monkeypatch: pytest.MonkeyPatch, grid: Grid, count: int, seed: int
) -> None:
    without_numbers(monkeypatch)
    side = 20
    rank_hw = make_ranks(grid, count, seed)
    photo = Image.new("RGB", (side * grid[1], side * grid[0]), (90, 120, 60))
    pixels_HW3 = np.asarray(region_tile(photo, rank_hw))
    middle = side // 2

    colour_of: dict[np.int64, tuple[int, ...]] = {}
    for (row, column), rank in np.ndenumerate(rank_hw):
        colour = tuple(pixels_HW3[row * side + middle, column * side + middle].tolist())
        assert colour_of.setdefault(rank, colour) == colour
    assert len(set(colour_of.values())) == count
    assert BORDER not in colour_of.values()

    border_HW = (pixels_HW3 == BORDER).all(axis=-1)
    for first in (side - 1, side):  # the pixels on both sides of a step
        right_hw = border_HW[middle::side, first::side][:, : grid[1] - 1]
        below_hw = border_HW[first::side, middle::side][: grid[0] - 1]
        np.testing.assert_array_equal(right_hw, np.diff(rank_hw, axis=1) != 0)
        np.testing.assert_array_equal(below_hw, np.diff(rank_hw, axis=0) != 0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(50))
def test_a_number_stands_inside_its_region(grid: Grid, seed: int) -> None:
    rank_hw = make_ranks(grid, 1 + seed % 5, seed)
    for rank in np.unique(rank_hw):
        assert rank_hw[label_patch(rank_hw == rank)] == rank


def test_a_number_stands_in_the_middle_or_on_the_ring() -> None:
    inside_hw = np.zeros((9, 9), dtype=bool)
    inside_hw[2:7, 3:8] = True
    assert label_patch(inside_hw) == (4, 5)
    inside_hw[3:6, 4:7] = False
    row, column = label_patch(inside_hw)
    assert inside_hw[row, column]
    assert max(abs(row - 4), abs(column - 5)) == 2


def test_numbers_are_the_ranks_from_one_and_lie_on_the_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Patches of 12 pixels along the edges are smaller than a number."""
    written: dict[str, tuple[float, float]] = {}

    def note(_: object, xy: tuple[float, float], text: str, *_args: object, **_set: object) -> None:
        written[text] = xy

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    rank_hw = np.full((16, 16), 4)
    rank_hw[0, 5], rank_hw[15, 9], rank_hw[7, 0], rank_hw[3, 15] = 0, 1, 2, 3
    region_tile(Image.new("RGB", (192, 192)), rank_hw)
    assert list(written) == ["1", "2", "3", "4", "5"]
    for text, (x, y) in written.items():
        assert 9 <= x <= 183
        assert 9 <= y <= 183
        assert rank_hw[int(y / 12), int(x / 12)] == int(text) - 1


def test_heat_rises_with_saliency_alone() -> None:
    photo = Image.new("RGB", (160, 20), (128, 128, 128))
    rising_hw = np.linspace(-3, 5, 8)[None]
    tile = np.asarray(heat_tile(photo, rising_hw))[10, 10::20]
    lightness = rgb2lab(tile[None] / 255)[0, :, 0]
    assert (np.diff(lightness) > 3).all()
    scaled = np.asarray(heat_tile(photo, rising_hw * 7 - 1))[10, 10::20]
    np.testing.assert_array_equal(tile, scaled)
    flat = np.asarray(heat_tile(photo, np.ones((1, 8))))
    assert (flat == tile[0]).all()


def test_heat_is_perceptually_even() -> None:
    """Lightness between the anchors, too, is within 1 of a straight line from 12 to 95."""
    share = np.linspace(0, 1, 101)
    anchors = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, anchors, HEAT[:, c]) for c in range(3)], axis=-1)
    lightness = rgb2lab(colours[None] / 255)[0, :, 0]
    assert np.abs(lightness - (12 + 83 * share)).max() < 1


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHT = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_ranks_are_told_apart_by_everyone(sight: str) -> None:
    encoded = PALETTE / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(SIGHT[sight]).T).clip(0, 1)
    shown = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(shown[None])[0]
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(len(lab), 1)]
    assert apart.min() > 33


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


def test_more_ranks_than_colours_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    without_numbers(monkeypatch)
    tile = region_tile(Image.new("RGB", (192, 192)), np.arange(16).reshape(4, 4))
    colours = [tile.getpixel((x, y)) for y in range(24, 192, 48) for x in range(24, 192, 48)]
    assert len(set(colours)) == len(PALETTE)
    assert colours[len(PALETTE) :] == colours[: 16 - len(PALETTE)]


@pytest.mark.parametrize(("class_token", "kind"), [(True, "cls_similarity"), (False, "grad_cam")])
def test_a_picture_shows_what_the_encoder_finds_salient(class_token: bool, kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VisionTransformer(
            image_size=(48, 64), patch_size=8, width=16, depth=3, heads=2, class_token=class_token
        )
    images_BCHW, _, _ = make_batch((6, 8), 2, side=8)
    saliency_BN = look_for_saliency(encoder, images_BCHW, kind=kind).saliency_BN
    assert saliency_BN is not None
    rank_BN = rank_regions(saliency_BN, (6, 8), 3, 0.02).rank_BN
    assert rank_BN.max() > 0
    picture = regions_picture(encoder, images_BCHW, num_regions=3, min_area=0.02, kind=kind)
    assert picture.tobytes() == draw_regions(images_BCHW, saliency_BN, rank_BN, (6, 8)).tobytes()


def test_what_cannot_be_drawn_is_named() -> None:
    images_BCHW, saliency_BN, rank_BN = make_batch((4, 4), 2)
    with pytest.raises(InputError, match=r"saliency of 2 images on a 4 x 5 grid must be \(2, 20\)"):
        draw_regions(images_BCHW, saliency_BN, rank_BN, (4, 5))
    with pytest.raises(InputError, match="not finite"):
        draw_regions(images_BCHW, saliency_BN / 0, rank_BN, (4, 4))
    with pytest.raises(InputError, match="found none"):
        draw_regions(images_BCHW[:0], saliency_BN[:0], rank_BN[:0], (4, 4))
