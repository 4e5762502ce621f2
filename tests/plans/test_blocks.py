"""Blocks are solid rectangles of the size drawn, at every position, from the key alone.

Suffixes: B images, M rectangles of an image, N patches (row-major), H rows, W columns.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, sample_keys
from dseqjepa.plans import blocks
from dseqjepa.plans.blocks import sample_blocks, sample_rectangles

GRIDS = [(14, 14), (8, 8), (7, 10), (16, 8), (5, 12)]
LARGE = (64, 64)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
AREA, ASPECT = (0.15, 0.2), (0.75, 1.5)

Grid = tuple[int, int]


def keys(count: int, epoch: int = 0) -> torch.Tensor:
    return sample_keys(7, epoch, torch.arange(count))


def rectangles(count: int, grid: Grid, number: int = 1, **ranges: tuple[float, float]):
    chosen = {"area": AREA, "aspect": ASPECT} | ranges
    rect_BMN = sample_rectangles(keys(count), grid, number, stream=Stream.BLOCKS, **chosen)
    return rect_BMN.unflatten(-1, grid)


def sides(rect_BMHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Height and width of the box around every rectangle."""
    return rect_BMHW.any(dim=3).sum(dim=2), rect_BMHW.any(dim=2).sum(dim=2)


def is_solid(rect_BMHW: torch.Tensor) -> bool:
    """One interval of rows, one interval of columns, and every patch of their product."""
    row_BMH, column_BMW = rect_BMHW.any(dim=3), rect_BMHW.any(dim=2)
    full = torch.equal(rect_BMHW, row_BMH[..., :, None] & column_BMW[..., None, :])
    starts = [
        (line[..., 1:] & ~line[..., :-1]).sum(dim=-1) + line[..., 0]
        for line in (row_BMH, column_BMW)
    ]
    return full and all(bool((start == 1).all()) for start in starts)


@pytest.mark.parametrize("grid", [*GRIDS, (1, 1), (1, 6), LARGE])
def test_every_block_is_one_solid_rectangle(grid: Grid) -> None:
    assert is_solid(rectangles(500, grid, 4))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_context_is_a_block_without_the_targets(grid: Grid) -> None:
    blocks = sample_blocks(keys(1000), grid)
    patches = grid[0] * grid[1]
    assert blocks.context_BN.shape == (1000, patches)
    assert blocks.target_BMN.shape == (1000, 4, patches)
    assert blocks.context_BN.dtype == blocks.target_BMN.dtype == torch.bool
    assert is_solid(blocks.target_BMN.unflatten(-1, grid))
    union_BN = blocks.target_BMN.any(dim=1)
    assert not (blocks.context_BN & union_BN).any()
    assert blocks.context_BN.any(dim=1).all()
    # Seen from the context's own box, only target patches are missing.
    context_BHW = blocks.context_BN.unflatten(-1, grid)
    box_BHW = context_BHW.any(dim=2)[:, :, None] & context_BHW.any(dim=1)[:, None, :]
    assert not (box_BHW.flatten(1) & ~blocks.context_BN & ~union_BN).any()


def test_the_context_block_is_square_and_as_large_as_asked() -> None:
    # One target of one patch: the box around the context is the context block.
    blocks = sample_blocks(keys(5000), LARGE, targets=1, target_area=(1e-9, 1e-9))
    height_B1, width_B1 = sides(blocks.context_BN.view(-1, 1, *LARGE))
    assert (height_B1 - width_B1).abs().max() <= 1
    area_B1 = height_B1 * width_B1 / 64**2
    assert area_B1.min() >= 0.85 - 0.01
    assert area_B1.max() > 0.99
    torch.testing.assert_close(area_B1.mean(), torch.tensor(0.925), atol=0.005, rtol=0)


def test_the_context_block_does_not_depend_on_the_number_of_targets() -> None:
    few, many = (sample_blocks(keys(200), (14, 14), targets=targets) for targets in (2, 6))
    assert torch.equal(few.target_BMN, many.target_BMN[:, :2])
    outside_BN = ~many.target_BMN.any(dim=1)
    assert torch.equal(few.context_BN & outside_BN, many.context_BN)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_patch_can_be_a_target_and_a_context(grid: Grid) -> None:
    blocks = sample_blocks(keys(4000), grid)
    assert blocks.target_BMN.flatten(0, 1).any(dim=0).all()
    assert blocks.context_BN.any(dim=0).all()
    # The four corners are drawn alike: none is lost, none is favoured.
    drawn_HW = blocks.target_BMN.double().mean(dim=(0, 1)).unflatten(0, grid)
    corners = drawn_HW[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 0.7 * corners.max() > 0
    torch.testing.assert_close(drawn_HW, drawn_HW.flip(0, 1), atol=0.02, rtol=0)


@pytest.mark.parametrize("grid", [(8, 8), (7, 10)])
def test_every_position_of_every_size_is_equally_likely(grid: Grid) -> None:
    rect_BMHW = rectangles(20_000, grid, 4)
    height, width = (side.flatten() for side in sides(rect_BMHW))
    top = rect_BMHW.any(dim=3).int().argmax(dim=2).flatten()
    left = rect_BMHW.any(dim=2).int().argmax(dim=2).flatten()
    sizes = torch.stack((height, width), dim=1).unique(dim=0).tolist()
    assert len(sizes) > 3
    for tall, wide in sizes:
        chosen = (height == tall) & (width == wide)
        down, across = grid[0] - tall + 1, grid[1] - wide + 1
        times = torch.bincount(top[chosen] * across + left[chosen], minlength=down * across)
        expected = int(chosen.sum()) / (down * across)
        chi_square = float(((times - expected) ** 2 / expected).sum())
        freedom = down * across - 1
        assert len(times) == down * across
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("grid", [*GRIDS, LARGE])
def test_area_and_aspect_are_within_their_ranges_up_to_rounding(grid: Grid) -> None:
    height_BM, width_BM = (side.double() for side in sides(rectangles(5000, grid, 4)))
    patches = grid[0] * grid[1]
    rounding_BM = torch.maximum(height_BM, width_BM) / 2
    area_BM = height_BM * width_BM
    assert (area_BM >= AREA[0] * patches - rounding_BM).all()
    assert (area_BM <= AREA[1] * patches + rounding_BM).all()
    # The height is within half a patch of sqrt(area * aspect), the width within half of the rest.
    free_BM = (height_BM < grid[0]) & (width_BM < grid[1])
    aspect_BM = (height_BM / width_BM)[free_BM]
    stretch_BM = (1 + 0.5 / (height_BM - 0.5)) ** 2 * (1 + 0.5 / (width_BM - 0.5))
    assert (aspect_BM >= ASPECT[0] / stretch_BM[free_BM]).all()
    assert (aspect_BM <= ASPECT[1] * stretch_BM[free_BM]).all()


def test_area_and_aspect_are_uniform_and_independent() -> None:
    height_BM, width_BM = (side.double() for side in sides(rectangles(20_000, LARGE)))
    area_B, aspect_B = ((height_BM * width_BM) / 64**2).flatten(), (height_BM / width_BM).flatten()
    for value_B, (low, high) in ((area_B, AREA), (aspect_B, ASPECT)):
        assert value_B.min() > low * 0.93
        assert value_B.max() < high * 1.07
        for part in (0.1, 0.25, 0.5, 0.75, 0.9):
            quantile = float(value_B.quantile(part))
            assert quantile == pytest.approx(low + part * (high - low), rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack((area_B, aspect_B)))[0, 1])) < 0.03


@pytest.mark.parametrize("grid", [(4, 40), (40, 4), (16, 8)])
def test_a_block_too_long_for_a_side_keeps_its_area(grid: Grid) -> None:
    height_BM, width_BM = sides(rectangles(2000, grid, area=(0.6, 0.9), aspect=(1.0, 1.0)))
    patches = grid[0] * grid[1]
    area_BM = (height_BM * width_BM).double()
    assert ((height_BM == grid[0]) | (width_BM == grid[1])).any()
    assert area_BM.min() >= 0.6 * patches - max(grid) / 2
    assert float(area_BM.mean()) == pytest.approx(0.75 * patches, rel=0.03)


def test_blocks_are_a_function_of_the_key_alone() -> None:
    keys_B = keys(60)
    together = sample_blocks(keys_B, (14, 14))
    shuffle_B = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = sample_blocks(keys_B[shuffle_B], (14, 14))
    assert torch.equal(shuffled.context_BN, together.context_BN[shuffle_B])
    assert torch.equal(shuffled.target_BMN, together.target_BMN[shuffle_B])
    alone = sample_blocks(keys_B[17:18], (14, 14))
    assert torch.equal(alone.target_BMN, together.target_BMN[17:18])
    other = sample_blocks(keys(60, epoch=1), (14, 14))
    assert not (other.target_BMN == together.target_BMN).all(dim=(1, 2)).any()


def test_blocks_are_the_rectangles_of_their_stream_after_the_context() -> None:
    target_BMN = sample_blocks(keys(50), (14, 14), targets=3).target_BMN
    assert torch.equal(target_BMN, rectangles(50, (14, 14), 4)[:, 1:].flatten(2))


def test_rectangles_of_an_image_and_of_streams_differ() -> None:
    keys_B = keys(500)
    one_BMN, other_BMN = (
        sample_rectangles(keys_B, (14, 14), 3, area=AREA, aspect=ASPECT, stream=stream)
        for stream in (Stream.BLOCKS, Stream.RECTANGLES)
    )
    assert (one_BMN == other_BMN).all(dim=-1).double().mean() < 0.05
    assert (one_BMN[:, 0] == one_BMN[:, 1]).all(dim=-1).double().mean() < 0.05
    first_BMN = sample_rectangles(
        keys_B, (14, 14), 1, area=AREA, aspect=ASPECT, stream=Stream.BLOCKS
    )
    assert torch.equal(first_BMN, one_BMN[:, :1])


def test_the_mean_context_is_that_of_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """90.0 of 196 patches; 80.6 if no block can reach the last row or column of the grid."""

    def mean() -> float:
        return float(sample_blocks(keys(20_000), (14, 14)).context_BN.sum(dim=1).double().mean())

    assert mean() == pytest.approx(90.0, abs=0.6)
    whole = blocks._span

    def short(length_BM: torch.Tensor, at_BM: torch.Tensor, side: int) -> torch.Tensor:
        return F.pad(whole(length_BM.clamp(max=side - 1), at_BM, side - 1), (0, 1))

    monkeypatch.setattr(blocks, "_span", short)
    assert mean() == pytest.approx(80.6, abs=0.6)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 3), (4, 4), (1, 9), (9, 1)])
def test_tiny_grids_have_blocks(grid: Grid) -> None:
    blocks = sample_blocks(keys(300), grid)
    assert blocks.target_BMN.any(dim=-1).all()
    assert not (blocks.context_BN[:, None] & blocks.target_BMN).any()


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_are_the_same_on_every_device(device: str) -> None:
    expected = sample_blocks(keys(500), (14, 14))
    got = sample_blocks(keys(500).to(device), (14, 14))
    assert torch.equal(got.context_BN.cpu(), expected.context_BN)
    assert torch.equal(got.target_BMN.cpu(), expected.target_BMN)


@pytest.mark.parametrize("limits", [(0.0, 0.5), (0.4, 0.3), (0.5, 1.2), (-0.1, 0.2)])
def test_areas_that_no_block_has_are_refused(limits: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="area"):
        rectangles(1, (4, 4), area=limits)
    with pytest.raises(InputError, match="area"):
        sample_blocks(keys(1), (4, 4), context_area=limits)


@pytest.mark.parametrize("limits", [(0.0, 1.0), (2.0, 1.0)])
def test_aspects_that_no_block_has_are_refused(limits: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="aspect"):
        rectangles(1, (4, 4), aspect=limits)


@pytest.mark.parametrize("epoch", range(4))
@pytest.mark.parametrize("grid", [(14, 14), (6, 11), (2, 3)])
def test_truncated_contexts_are_the_first_patches_of_one_length(grid: Grid, epoch: int) -> None:
    keys_B = keys(64, epoch)
    blocks = sample_blocks(keys_B, grid, truncate=True)
    size_BM = blocks.target_BMN.sum(dim=2)
    assert (size_BM == size_BM[0, 0]).all()  # one size of target in the whole batch
    wide = sample_blocks(keys_B, grid, truncate=False)
    assert blocks.target_BMN[0, 0].sum() == wide.target_BMN[0, 0].sum()  # that of the first image
    length_B = blocks.context_BN.sum(dim=1)
    kept = int(length_B.max())
    assert set(length_B.tolist()) <= {0, kept}
    assert kept > 0
    assert not (blocks.context_BN & blocks.target_BMN.any(dim=1)).any()
    alone = sample_blocks(keys_B[:1], grid, truncate=True)  # a batch of one loses nothing
    assert torch.equal(alone.target_BMN, blocks.target_BMN[:1])
    assert torch.equal(alone.context_BN.nonzero()[:kept], blocks.context_BN[:1].nonzero())
