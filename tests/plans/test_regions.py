"""Regions equal a construction by scikit-image, SciPy and exact fractions, one image at a time.

Suffixes: B images, N patches (row-major), H rows, W columns.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from dseqjepa.errors import InputError
from dseqjepa.keyed import sample_keys
from dseqjepa.plans import regions as regions_module
from dseqjepa.plans.regions import ORDERS, Regions, order_regions, rank_regions

GRIDS = [(8, 8), (14, 14), (7, 10), (3, 5), (16, 8), (1, 6)]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
EIGHT_NEIGHBOURS = np.ones((3, 3))
WITHIN_IMAGES = np.stack([np.zeros((3, 3)), EIGHT_NEIGHBOURS, np.zeros((3, 3))])

Grid = tuple[int, int]
Component = tuple[Fraction, int, NDArray[np.bool_]]


def make_maps(grid: Grid, each: int = 36) -> torch.Tensor:
    """Noise, smooth noise at two scales, maps of few values, maps of two values, flat maps."""
    generator = np.random.default_rng(grid[0] * 100 + grid[1])
    noise = generator.standard_normal((each, *grid))
    smooth = [ndimage.gaussian_filter(noise, (0, sigma, sigma)) for sigma in (0.7, 1.6)]
    quantised = generator.integers(0, 5, noise.shape) * 0.3 - 0.2
    eighths = np.floor(generator.random(noise.shape) * 8) / 8
    two_values = np.where(generator.random(noise.shape) < 0.35, 2.5, -1.0)
    flat = np.full((2, *grid), 0.7)
    maps = np.concatenate([noise, *smooth, quantised, eighths, two_values, flat])
    return torch.from_numpy(maps.reshape(len(maps), -1))


def components_one_image(saliency_N: NDArray[np.float64], grid: Grid) -> list[Component]:
    """Components in the documented order: exact mean of A in steps of 2**-40, then first patch."""
    if np.ptp(saliency_N) == 0:
        return []
    scaled_HW = ((saliency_N - saliency_N.min()) / np.ptp(saliency_N)).reshape(grid)
    label_HW, number = ndimage.label(
        scaled_HW > threshold_otsu(scaled_HW, nbins=256), structure=EIGHT_NEIGHBOURS
    )
    steps_N = [round(Fraction(value) * 2**40) for value in scaled_HW.flatten().tolist()]
    found = []
    for label in range(1, number + 1):
        inside_N = (label_HW == label).flatten()
        patches = np.flatnonzero(inside_N).tolist()
        mean = Fraction(sum(steps_N[patch] for patch in patches), len(patches))
        found.append((mean, patches[0], inside_N))
    return sorted(found, key=lambda component: (-component[0], component[1]))


def rank_one_image(found: list[Component], patches: int, num_regions: int, min_area: float):
    large = [inside_N for _, _, inside_N in found if not inside_N.sum() < min_area * patches]
    kept = large[: num_regions - 1]
    rank_N = np.full(patches, len(kept))
    for rank, inside_N in enumerate(kept):
        rank_N[inside_N] = rank
    return rank_N


def keys(count: int, epoch: int = 0) -> torch.Tensor:
    return sample_keys(3, epoch, torch.arange(count))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grid", GRIDS)
def test_regions_equal_the_one_image_construction(grid: Grid, device: str) -> None:
    saliency_BN = make_maps(grid)
    patches = saliency_BN.shape[1]
    found_B = [components_one_image(saliency_N.numpy(), grid) for saliency_N in saliency_BN]
    for num_regions in range(2, 8):
        for min_area in (0.0, 0.05, 0.15, 0.5):
            got = rank_regions(saliency_BN.to(device), grid, num_regions, min_area)
            expected_BN = [rank_one_image(f, patches, num_regions, min_area) for f in found_B]
            np.testing.assert_array_equal(got.rank_BN.cpu().numpy(), expected_BN)
            assert got.count_B.tolist() == [rank_N.max() + 1 for rank_N in expected_BN]


def test_the_maps_above_exercise_many_regions_and_ties() -> None:
    ties = 0
    for grid in GRIDS:
        for saliency_N in make_maps(grid):
            found = components_one_image(saliency_N.numpy(), grid)
            ties += any(one[0] == other[0] for one, other in pairwise(found))
    assert ties > 100
    assert rank_regions(make_maps((14, 14)), (14, 14), 7, 0.0).count_B.max() == 7
    assert sum(len(make_maps(grid)) for grid in GRIDS) >= 1000


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("min_area", [0.0, 0.15, 1.0])
def test_ranks_are_exactly_zero_to_count_minus_one(grid: Grid, min_area: float) -> None:
    regions = rank_regions(make_maps(grid), grid, 5, min_area)
    assert regions.rank_BN.dtype == regions.count_B.dtype == torch.int64
    assert int(regions.count_B.max()) <= 5
    for rank_N, count in zip(regions.rank_BN, regions.count_B.tolist(), strict=True):
        assert rank_N.unique().tolist() == list(range(count))


def test_flat_maps_have_one_region() -> None:
    for value in (0.0, 0.1, -3e30):
        regions = rank_regions(torch.full((2, 12), value), (3, 4))
        assert regions.count_B.tolist() == [1, 1]
        assert not regions.rank_BN.any()


def test_an_area_of_exactly_the_minimum_is_kept() -> None:
    saliency_HW = torch.zeros(1, 10, 10)
    saliency_HW[0, :3, :5] = 1.0  # 15 of 100 patches
    saliency_HW[0, 6:, 6:9] = 0.9  # 12 of 100
    assert rank_regions(saliency_HW.flatten(1), (10, 10), 5, 0.15).count_B.tolist() == [2]
    assert rank_regions(saliency_HW.flatten(1), (10, 10), 5, 0.12).count_B.tolist() == [3]
    # In float64 0.55 * 100 is above 55; in float32 it is not.
    saliency_HW = torch.zeros(1, 10, 10)
    saliency_HW[0, :5] = saliency_HW[0, 5, :5] = 1.0
    assert rank_regions(saliency_HW.flatten(1), (10, 10), 5, 0.55).count_B.tolist() == [1]


def test_a_patch_exactly_at_the_threshold_is_background() -> None:
    saliency_BN = torch.tensor([[0.0, 0.0, 1 / 512, 1 / 512, 1.0, 1.0]])  # Otsu gives 1 / 512
    assert rank_regions(saliency_BN, (1, 6)).rank_BN.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_equal_means_are_ordered_by_their_first_patch() -> None:
    saliency_HW = torch.zeros(1, 4, 7)
    saliency_HW[0, 1:, 0] = saliency_HW[0, :2, 6] = saliency_HW[0, 2:, 3] = 1.0
    rank_HW = rank_regions(saliency_HW.flatten(1), (4, 7), 5, 0.0).rank_BN.view(4, 7)
    assert (int(rank_HW[0, 6]), int(rank_HW[1, 0]), int(rank_HW[2, 3])) == (0, 1, 2)


def test_an_image_does_not_depend_on_its_batch() -> None:
    saliency_BN = make_maps((7, 10))
    together = rank_regions(saliency_BN, (7, 10), 5, 0.05)
    shuffle_B = torch.randperm(len(saliency_BN), generator=torch.Generator().manual_seed(0))
    shuffled = rank_regions(saliency_BN[shuffle_B], (7, 10), 5, 0.05)
    assert torch.equal(shuffled.rank_BN, together.rank_BN[shuffle_B])
    assert torch.equal(shuffled.count_B, together.count_B[shuffle_B])
    alone = rank_regions(saliency_BN[41:42], (7, 10), 5, 0.05)
    assert torch.equal(alone.rank_BN, together.rank_BN[41:42])
    assert rank_regions(saliency_BN[:0], (7, 10)).rank_BN.shape == (0, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_float_type_does_not_matter(dtype: torch.dtype) -> None:
    saliency_BN = make_maps((14, 14)).to(dtype)
    narrow, wide = (rank_regions(s, (14, 14)) for s in (saliency_BN, saliency_BN.double()))
    assert torch.equal(narrow.rank_BN, wide.rank_BN)
    scaled = rank_regions(saliency_BN.double() * 2**60, (14, 14))
    assert torch.equal(scaled.rank_BN, wide.rank_BN)


def test_memory_layout_does_not_matter_and_the_input_stays() -> None:
    saliency_BN = make_maps((16, 8))
    before_BN = saliency_BN.clone()
    regions = rank_regions(saliency_BN, (16, 8))
    assert torch.equal(saliency_BN, before_BN)
    strided_BN = saliency_BN.t().contiguous().t()
    assert torch.equal(rank_regions(strided_BN, (16, 8)).rank_BN, regions.rank_BN)


# Two-valued maps with no minimum area are ranked in the order of their components' first patches:
# the rank is then SciPy's label, less one.


def assert_labelled(mask_BHW: NDArray[np.bool_]) -> None:
    mixed_B = mask_BHW.any(axis=(1, 2)) & ~mask_BHW.all(axis=(1, 2))
    mask_BHW = mask_BHW[mixed_B]
    label_BHW, _ = ndimage.label(mask_BHW, structure=WITHIN_IMAGES)
    last_B = np.maximum.accumulate(label_BHW.max(axis=(1, 2)))
    number_B = np.diff(last_B, prepend=0)
    expected_BHW = label_BHW - 1 - (last_B - number_B)[:, None, None]
    expected_BHW = np.where(mask_BHW, expected_BHW, number_B[:, None, None])
    saliency_BN = torch.from_numpy(mask_BHW.reshape(len(mask_BHW), -1)).float()
    grid = (mask_BHW.shape[1], mask_BHW.shape[2])
    got = rank_regions(saliency_BN, grid, int(number_B.max()) + 1, 0.0)
    np.testing.assert_array_equal(got.rank_BN.numpy().reshape(mask_BHW.shape), expected_BHW)


def spiral(side: int) -> NDArray[np.bool_]:
    """A line one patch wide that winds inwards, one patch away from itself."""
    mask_HW = np.zeros((side, side), dtype=bool)
    row, column, (down, right) = 0, -1, (0, 1)
    for length in [side, *(n for n in range(side - 1, 0, -2) for _ in range(2))]:
        for _ in range(length):
            row, column = row + down, column + right
            mask_HW[row, column] = True
        down, right = right, -down
    return mask_HW


def awkward_masks(side: int) -> list[NDArray[np.bool_]]:
    generator = np.random.default_rng(side)
    row_HW, column_HW = np.indices((side, side))
    serpentine = row_HW % 2 == 0
    for row in range(1, side, 2):
        serpentine[row, -1 if row % 4 == 1 else 0] = True
    zigzag = np.abs((row_HW + 2) % 4 - 2) == column_HW % 4
    checkerboard = (row_HW + column_HW) % 2 == 0
    diagonals = (row_HW - column_HW) % 3 == 0
    lattice = (row_HW % 2 == 0) & (column_HW % 2 == 0)
    combs = []
    for _ in range(20):  # teeth of random lengths: roots meet only at the far end, in any order
        comb = (column_HW % 2 == 0) & (row_HW >= generator.integers(0, side, side))
        combs.append(comb | (row_HW == side - 1))
        depth_W = generator.integers(1, side, side)
        combs.append(comb | ((column_HW % 2 == 1) & (row_HW == depth_W)))
    trees = []
    for _ in range(5):  # a spanning tree of the lattice: winding, branching corridors
        tree = lattice.copy()
        grown = {(0, 0)}
        while len(grown) < ((side + 1) // 2) ** 2:
            row, column = sorted(grown)[generator.integers(len(grown))]
            down, right = [(0, 1), (1, 0), (0, -1), (-1, 0)][generator.integers(4)]
            far = (row + 2 * down, column + 2 * right)
            if min(far) >= 0 and max(far) < side and far not in grown:
                tree[row + down, column + right] = True
                grown.add(far)
        trees.append(tree)
    masks = [spiral(side), serpentine, zigzag, checkerboard, diagonals, lattice]
    masks += combs + trees
    turned = [np.rot90(mask_HW, turn) for mask_HW in masks for turn in range(4)]
    return turned + [mask_HW.T for mask_HW in turned] + [~mask_HW for mask_HW in turned]


@pytest.mark.parametrize("side", [5, 8, 14, 29])
def test_spirals_serpentines_combs_and_mazes_are_labelled_right(side: int) -> None:
    assert_labelled(np.stack(awkward_masks(side)))


def test_a_spiral_is_one_component() -> None:
    mask_HW = spiral(14)
    regions = rank_regions(torch.from_numpy(mask_HW).double().view(1, -1), (14, 14), 5, 0.0)
    assert regions.count_B.tolist() == [2]
    assert mask_HW.sum() > 80


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (2, 7), (1, 9), (9, 1)])
def test_every_mask_of_a_small_grid_is_labelled_right(grid: Grid) -> None:
    patches = grid[0] * grid[1]
    bit_BN = (np.arange(2**patches)[:, None] >> np.arange(patches)) & 1
    assert_labelled(bit_BN.astype(bool).reshape(-1, *grid))


@pytest.mark.parametrize("grid", [(14, 14), (23, 9), (6, 40)])
def test_random_masks_are_labelled_right_at_every_density(grid: Grid) -> None:
    generator = np.random.default_rng(1)
    density_B11 = np.linspace(0.02, 0.98, 300)[:, None, None]
    assert_labelled(generator.random((300, *grid)) < density_B11)


def test_the_fixed_number_of_rounds_of_an_accelerator_suffices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regions_module, "_known_equal", lambda one, other: False)
    assert_labelled(np.stack(awkward_masks(14)))
    assert_labelled(np.random.default_rng(2).random((200, 14, 14)) < 0.4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.7e308])
def test_maps_that_are_not_finite_are_refused(value: float) -> None:
    saliency_BN = torch.rand(3, 12, dtype=torch.float64)
    saliency_BN[1, 4], saliency_BN[1, 5] = value, -1.7e308
    with pytest.raises(InputError, match=r"finite.* image 1 "):
        rank_regions(saliency_BN, (3, 4))


def test_bad_arguments_are_named() -> None:
    saliency_BN = torch.rand(2, 12)
    with pytest.raises(InputError, match=r"\(images, 20\).*found \(2, 12\)"):
        rank_regions(saliency_BN, (4, 5))
    with pytest.raises(InputError, match="num_regions"):
        rank_regions(saliency_BN, (3, 4), num_regions=1)
    for min_area in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="min_area"):
            rank_regions(saliency_BN, (3, 4), min_area=min_area)
    with pytest.raises(InputError, match=r"saliency, inverse, random, spatial.*'salient'"):
        order_regions(rank_regions(saliency_BN, (3, 4)), "salient", (3, 4), keys(2))


def mixed_regions() -> Regions:
    regions = rank_regions(make_maps((14, 14)), (14, 14), 6, 0.01)
    assert regions.count_B.unique().tolist() == [1, 2, 3, 4, 5, 6]
    return regions


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_renumbers_and_keeps_the_partition(order: str) -> None:
    regions = mixed_regions()
    ordered = order_regions(regions, order, (14, 14), keys(len(regions.count_B)))
    assert torch.equal(ordered.count_B, regions.count_B)
    assert ordered.rank_BN.dtype == torch.int64
    for old_N, new_N, count in zip(
        regions.rank_BN, ordered.rank_BN, regions.count_B.tolist(), strict=True
    ):
        pairs = torch.stack((old_N, new_N)).unique(dim=1)
        assert pairs[0].tolist() == list(range(count))
        assert sorted(pairs[1].tolist()) == list(range(count))


def test_saliency_order_is_the_identity_and_inverse_its_own_inverse() -> None:
    regions = mixed_regions()
    keys_B = keys(len(regions.count_B))
    same = order_regions(regions, "saliency", (14, 14), keys_B)
    assert torch.equal(same.rank_BN, regions.rank_BN)
    inverse = order_regions(regions, "inverse", (14, 14), keys_B)
    assert torch.equal(inverse.rank_BN, regions.count_B[:, None] - 1 - regions.rank_BN)
    twice = order_regions(inverse, "inverse", (14, 14), keys_B)
    assert torch.equal(twice.rank_BN, regions.rank_BN)


def test_spatial_order_is_the_raster_order_of_centroids() -> None:
    regions = mixed_regions()
    grid = (14, 14)
    ordered = order_regions(regions, "spatial", grid, keys(len(regions.count_B)))
    for rank_N, count in zip(ordered.rank_BN, ordered.count_B.tolist(), strict=True):
        rank_HW = rank_N.numpy().reshape(grid)
        cells = [np.argwhere(rank_HW == rank).tolist() for rank in range(count)]
        centroids = [
            tuple(Fraction(sum(axis), len(axis)) for axis in zip(*cell, strict=True))
            for cell in cells
        ]
        assert centroids == sorted(centroids)


def test_spatial_order_breaks_equal_rows_by_column() -> None:
    rank_HW = torch.tensor([[2, 2, 1, 1, 0], [2, 2, 1, 1, 0]])
    regions = Regions(rank_HW.view(1, -1), torch.tensor([3]), 3)
    ordered = order_regions(regions, "spatial", (2, 5), keys(1))
    assert ordered.rank_BN.view(2, 5)[0].tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_random_order_is_uniform_over_permutations(count: int) -> None:
    images = 24_000
    rank_BN = torch.arange(count).expand(images, count)
    regions = Regions(rank_BN, torch.full((images,), count), count)
    ordered = order_regions(regions, "random", (1, count), keys(images))
    drawn, times = ordered.rank_BN.unique(dim=0, return_counts=True)
    assert [tuple(one) for one in drawn.tolist()] == sorted(permutations(range(count)))
    expected = images / len(times)
    chi_square = float(((times - expected) ** 2 / expected).sum())
    freedom = len(times) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_random_order_is_a_function_of_the_key_alone() -> None:
    regions = mixed_regions()
    keys_B = keys(len(regions.count_B))
    together = order_regions(regions, "random", (14, 14), keys_B)
    for some_B in (regions.count_B <= 3, keys_B % 2 == 0):
        part = Regions(
            regions.rank_BN[some_B].flip(0), regions.count_B[some_B].flip(0), regions.most
        )
        alone = order_regions(part, "random", (14, 14), keys_B[some_B].flip(0))
        assert torch.equal(alone.rank_BN, together.rank_BN[some_B].flip(0))
    other = order_regions(regions, "random", (14, 14), keys(len(keys_B), epoch=1))
    assert not torch.equal(other.rank_BN, together.rank_BN)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_order_is_the_same_on_every_device(order: str, device: str) -> None:
    regions = mixed_regions()
    keys_B = keys(len(regions.count_B))
    expected = order_regions(regions, order, (14, 14), keys_B)
    moved = Regions(regions.rank_BN.to(device), regions.count_B.to(device), regions.most)
    got = order_regions(moved, order, (14, 14), keys_B.to(device))
    assert torch.equal(got.rank_BN.cpu(), expected.rank_BN)
