"""Tiles match their patches: colours, borders, numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from skimage.color import rgb2lab

from dseqjepa.viz.style import BORDER, HEAT, PALETTE
from dseqjepa.viz.tiles import (
    colour_tile,
    heat_of,
    heat_tile,
    label_patch,
    mask_tile,
    photo_of,
    region_tile,
    step_tile,
    value_tile,
)
from tests.viz.pages import GRIDS, Grid, make_ranks, without_numbers


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


def test_more_ranks_than_colours_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    without_numbers(monkeypatch)
    tile = region_tile(Image.new("RGB", (192, 192)), np.arange(16).reshape(4, 4))
    colours = [tile.getpixel((x, y)) for y in range(24, 192, 48) for x in range(24, 192, 48)]
    assert len(set(colours)) == len(PALETTE)
    assert colours[len(PALETTE) :] == colours[: 16 - len(PALETTE)]


def test_a_photo_keeps_its_shape() -> None:
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[0] = 200
    photo = photo_of(image, 96)
    assert photo.size == (96, 64)
    assert photo.getpixel((50, 30)) == (200, 0, 0)


def test_heat_of_values_is_clipped_to_the_limits() -> None:
    colours = heat_of(np.array([-9.0, 0.0, 5.0, 10.0, 99.0]), (0.0, 10.0))
    np.testing.assert_array_equal(colours[[0, 1]], HEAT[[0, 0]])
    np.testing.assert_array_equal(colours[[3, 4]], HEAT[[-1, -1]])
    np.testing.assert_array_equal(heat_of(np.array([3.0]), (3.0, 3.0)), HEAT[:1])


def test_a_step_shows_what_was_seen_and_how_well_the_rest_was_guessed() -> None:
    """Context pixels are the picture's own, targets have the heat of their loss, others a veil."""
    generator = np.random.default_rng(0)
    photo = Image.fromarray(generator.integers(0, 256, (80, 120, 3), np.uint8))
    context_hw = np.zeros((4, 6), dtype=bool)
    context_hw[:, :2] = True
    loss_hw = np.full((4, 6), np.nan)
    loss_hw[:, 2:4] = np.linspace(0, 1, 8).reshape(4, 2)
    tile = np.asarray(step_tile(photo, context_hw, loss_hw, (0.0, 1.0)))
    pixels, heat = np.asarray(photo), np.asarray(value_tile(photo, np.nan_to_num(loss_hw), (0, 1)))
    np.testing.assert_array_equal(tile[:, :37], pixels[:, :37])
    np.testing.assert_array_equal(tile[:, 43:77], heat[:, 43:77])
    assert (tile[:, 38:42] == BORDER).all(axis=-1).any()
    assert tile[:, 83:].std() < 0.3 * pixels[:, 83:].std()
    np.testing.assert_array_equal(np.asarray(mask_tile(photo, context_hw))[:, :37], pixels[:, :37])


def test_a_white_picture_shows_where_it_was_not_seen() -> None:
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    inside_hw = np.zeros((4, 4), dtype=bool)
    inside_hw[0] = True
    tile = np.asarray(mask_tile(white, inside_hw)).astype(int)
    assert (tile[0] == 255).all()
    assert (tile[-1] < 230).all()


def test_own_colours_fill_their_patches() -> None:
    colour_hw3 = np.arange(24.0).reshape(2, 4, 3)
    tile = np.asarray(colour_tile(Image.new("RGB", (40, 20)), colour_hw3))
    np.testing.assert_array_equal(tile[5::10, 5::10], colour_hw3.astype(np.uint8))
