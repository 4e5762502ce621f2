"""From a saliency map to ordered regions: DSeq-JEPA (arXiv 2511.17354), equations 1 to 3.

There are three ways to cut an image: the paper's components above a threshold, clusters of patch
features, and bands of the saliency itself. A partition of the patch grid is one integer per patch,
its rank, so regions can neither overlap nor miss a patch. Everything is computed for
the whole batch at once, in float64 and in integers whose sums are exact, so that CPU and GPU
give the same regions.

Suffixes: B images, N patches of a grid (row-major), P cells of the padded grid (row-major),
V histogram bins, K regions, D width, X axes (row, column).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, uniforms
from dseqjepa.plans.clusters import cluster_patches

BINS = 256
FIXED_POINT = 2**40
KINDS = ("components", "clusters", "bands")
ORDERS = ("saliency", "inverse", "random", "spatial")


@dataclass(frozen=True, eq=False)
class Regions:
    """A partition of every image's patches into ordered regions.

    `rank_BN` contains 0 .. K-1, each at least once; `count_B` is K, which differs between images,
    and `most` the limit on K, which no image need reach.
    """

    rank_BN: Int64[Tensor, "B N"]
    count_B: Int64[Tensor, " B"]
    most: int


def rank_regions(
    saliency_BN: Float[Tensor, "B N"],
    grid: tuple[int, int],
    num_regions: int = 5,
    min_area: float = 0.15,
    *,
    kind: str = "components",
    features_BND: Float[Tensor, "_ _ D"] | None = None,
) -> Regions:
    """Cut saliency maps into regions and rank them, most salient first.

    Each map is scaled to [0, 1] (eq. 1). `kind` defines the regions:

    - `components`, the paper's: 8-connected components above Otsu's threshold that cover at least
      `min_area` of the grid compete by their mean saliency. The best `num_regions - 1` get
      ranks 0, 1, ... and everything else is the last rank, the left-over region (eq. 2 and 3).
    - `clusters`: the patches' features are clustered into `num_regions` (`cluster_patches`; the
      first centre is the most salient patch), and clusters are ranked by their mean saliency.
      Clusters smaller than `min_area` are dissolved into the others.
    - `bands`: bands with equally many patches, from the most to the least salient, `num_regions` or
      as many as `min_area` allows. Patches of equal saliency stay together.

    For equal means, the region with the first patch in row-major order comes first. Means are those
    of the scaled map, rounded to multiples of 2**-40. An image that cannot be cut (a flat map, or
    identical features) has one region: count 1, rank 0 everywhere.

    Args:
        saliency_BN: any float type, scale and sign, on any device.
        grid: rows and columns of patches; their product is N.
        num_regions: maximum number of regions per image, including the left-over region; at least
            2.
        min_area: minimum fraction of the grid that a region must cover, 0 to 1; the left-over
            region may be smaller.
        kind: `components`, `clusters` or `bands`.
        features_BND: the features to cluster; only `clusters` uses them.

    Raises:
        InputError: an argument out of range, a shape that does not match the grid, or, on the CPU,
            a non-finite map. On other devices, where checking would synchronize, such an
            image counts as flat.
    """
    _check_arguments(saliency_BN, grid, num_regions, min_area, kind, features_BND)
    scaled_BN = _scale(saliency_BN.to(torch.float64))
    patches = scaled_BN.shape[1]
    smallest = max(1, math.ceil(min_area * patches))
    if kind == "components":
        return _rank_components(scaled_BN, grid, num_regions, smallest)
    if kind == "bands":
        part_BN = _bands(scaled_BN, min(num_regions, patches // smallest))
    else:
        assert features_BND is not None
        most_salient_B = scaled_BN.argmax(dim=1)
        part_BN = cluster_patches(features_BND, most_salient_B, num_regions, smallest=smallest)
    return _rank_parts(part_BN, scaled_BN, num_regions)


def _check_arguments(
    saliency_BN: Tensor,
    grid: tuple[int, int],
    num_regions: int,
    min_area: float,
    kind: str,
    features_BND: Tensor | None,
) -> None:
    height, width = grid
    patches = height * width
    if saliency_BN.ndim != 2 or saliency_BN.shape[1] != patches:
        raise InputError(
            f"saliency must be (images, {patches}) for a {height} x {width} grid, "
            f"found {tuple(saliency_BN.shape)}; pass one row of patches per image"
        )
    if num_regions < 2:
        raise InputError(
            f"num_regions must be at least 2 (the left-over counts), not {num_regions}"
        )
    if not 0 <= min_area <= 1:
        raise InputError(f"min_area is a fraction of the grid, 0 to 1, not {min_area}")
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind != "clusters":
        return
    if num_regions > patches:
        raise InputError(
            f"clusters need at least as many patches as regions: {num_regions} regions on a "
            f"{height} x {width} grid; lower num_regions"
        )
    wanted = tuple(saliency_BN.shape)
    if features_BND is None or features_BND.ndim != 3 or features_BND.shape[:2] != wanted:
        found = None if features_BND is None else tuple(features_BND.shape)
        raise InputError(f"clusters need features_BND of shape {wanted} + (width,), found {found}")


def _rank_components(
    scaled_BN: Float64[Tensor, "B N"], grid: tuple[int, int], num_regions: int, smallest: int
) -> Regions:
    height, width = grid
    foreground_BP = _pad(_above_otsu(scaled_BN), grid)
    root_BP = _component_roots(foreground_BP, grid)

    # Integers: sums do not depend on the order in which a GPU adds.
    fixed_BP = _pad((scaled_BN * FIXED_POINT).round().to(torch.int64), grid)
    area_BP = torch.zeros_like(root_BP).scatter_add_(1, root_BP, foreground_BP.to(torch.int64))
    total_BP = torch.zeros_like(root_BP).scatter_add_(1, root_BP, fixed_BP)
    mean_BP = total_BP.to(torch.float64) / area_BP
    score_BP = torch.where(foreground_BP & (area_BP >= smallest), mean_BP, -1.0)

    rank_of_root_BP = torch.full_like(root_BP, num_regions)
    kept_B1 = torch.zeros_like(root_BP[:, :1])
    for rank in range(min(num_regions - 1, height * width // smallest)):
        best_B1, cell_B1 = score_BP.max(dim=1, keepdim=True)  # the first maximum: the tie rule
        rank_of_root_BP.scatter_(1, cell_B1, rank)
        score_BP.scatter_(1, cell_B1, -2.0)  # below the cells that never competed: no second turn
        kept_B1 += best_B1 >= 0

    # Whatever was given a turn without competing has a rank of at least the number kept.
    rank_BP = rank_of_root_BP.gather(1, root_BP).minimum(kept_B1)
    rank_BN = rank_BP.unflatten(1, (height + 1, width + 1))[:, :height, :width].flatten(1)
    # The least salient patch is never foreground, so something is always left over.
    return Regions(rank_BN, kept_B1[:, 0] + 1, num_regions)


def _bands(scaled_BN: Float64[Tensor, "B N"], bands: int) -> Int64[Tensor, "B N"]:
    """Each patch's band, 0 being the most salient, by how many patches are more salient."""
    ascending_BN = scaled_BN.sort(dim=1).values
    at_most_BN = torch.searchsorted(ascending_BN, scaled_BN.contiguous(), right=True)
    patches = scaled_BN.shape[1]
    return (patches - at_most_BN) * bands // patches


def _rank_parts(
    part_BN: Int64[Tensor, "B N"], scaled_BN: Float64[Tensor, "B N"], parts: int
) -> Regions:
    """Number the parts of each image by mean saliency; parts without patches are dropped."""
    B, N = part_BN.shape
    area_BK = part_BN.new_zeros(B, parts).scatter_add_(1, part_BN, torch.ones_like(part_BN))
    fixed_BN = (scaled_BN * FIXED_POINT).round().to(torch.int64)
    total_BK = part_BN.new_zeros(B, parts).scatter_add_(1, part_BN, fixed_BN)
    mean_BK = torch.where(area_BK > 0, total_BK.to(torch.float64) / area_BK, -1.0)
    patch_BN = torch.arange(N, device=part_BN.device).expand(B, N)
    first_BK = torch.full_like(area_BK, N).scatter_reduce_(1, part_BN, patch_BN, "amin")
    by_first_BK = _argsort(first_BK)
    by_mean_BK = _argsort(-mean_BK.gather(1, by_first_BK))
    rank_BK = _argsort(by_first_BK.gather(1, by_mean_BK))
    return Regions(rank_BK.gather(1, part_BN), (area_BK > 0).sum(dim=1), parts)


def otsu_foreground(saliency_BN: Float[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
    """The patches above Otsu's threshold of their map (eq. 1 and 2), from which regions are cut.

    Maps are scaled as in `rank_regions`, with its error; a flat map has no foreground.
    """
    return _above_otsu(_scale(saliency_BN.to(torch.float64)))


def order_regions(
    regions: Regions, order: str, grid: tuple[int, int], keys_B: Int64[Tensor, " B"]
) -> Regions:
    """Renumber every image's regions, including the left-over; the partition is kept (Table 5).

    Args:
        regions: from `rank_regions`.
        order: `saliency` keeps the order; `inverse` reverses it; `random` is a uniform
            permutation, a function of the image's key only; `spatial` is the raster order of
            centroids: by mean row, then by mean column.
        grid: rows and columns of patches.
        keys_B: the images' keys, used only by `random`.

    Raises:
        InputError: an unknown order.
    """
    if order not in ORDERS:
        raise InputError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    if order == "saliency":
        return regions
    if order == "inverse":
        return replace(regions, rank_BN=regions.count_B[:, None] - 1 - regions.rank_BN)

    most = regions.most
    if order == "random":
        absent_BK = torch.arange(most, device=regions.count_B.device) >= regions.count_B[:, None]
        sequence_BK = _argsort(uniforms(keys_B, Stream.ORDER, most).masked_fill(absent_BK, 1.0))
    else:
        row_BK, column_BK = _centroids(regions.rank_BN, grid, most).unbind(-1)
        by_column_BK = _argsort(column_BK)
        by_row_BK = _argsort(row_BK.gather(1, by_column_BK))
        sequence_BK = by_column_BK.gather(1, by_row_BK)
    return replace(regions, rank_BN=_argsort(sequence_BK).gather(1, regions.rank_BN))


def _argsort(values_BK: Shaped[Tensor, "B K"]) -> Int64[Tensor, "B K"]:
    return values_BK.argsort(dim=1, stable=True)


def _centroids(
    rank_BN: Int64[Tensor, "B N"], grid: tuple[int, int], most: int
) -> Float64[Tensor, "B K X"]:
    """Mean row and column of every region; NaN, which sorts last, for regions an image lacks."""
    cell_N = torch.arange(grid[0] * grid[1], device=rank_BN.device)
    cell_NX = torch.stack((cell_N // grid[1], cell_N % grid[1]), dim=1).to(torch.float64)
    inside_BKN = rank_BN[:, None, :] == torch.arange(most, device=rank_BN.device)[:, None]
    return inside_BKN.to(torch.float64) @ cell_NX / inside_BKN.sum(dim=2, keepdim=True)


def _scale(saliency_BN: Float64[Tensor, "B N"]) -> Float64[Tensor, "B N"]:
    """Min-max normalization (eq. 1); a flat map becomes zero."""
    low_B1, high_B1 = saliency_BN.aminmax(dim=1, keepdim=True)
    span_B1 = high_B1 - low_B1
    if _may_look(span_B1) and not span_B1.isfinite().all():
        image = int((~span_B1.isfinite()).nonzero()[0, 0])
        raise InputError(
            f"saliency must be finite, found NaN, infinity or an overflowing range in image "
            f"{image} of the batch; find the step at which the encoder's features diverged"
        )
    return (saliency_BN - low_B1) / torch.where(span_B1 == 0, 1.0, span_B1)


def _above_otsu(scaled_BN: Float64[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
    return scaled_BN > _otsu_threshold(scaled_BN)[:, None]


def _otsu_threshold(scaled_BN: Float64[Tensor, "B N"]) -> Float64[Tensor, " B"]:
    """Otsu's threshold of maps in [0, 1]: the centre of the histogram bin that splits them best.

    Bin edges and centres are dyadic, so counts and moments are exact in any summation order. The
    result equals scikit-image's `threshold_otsu` bit for bit (up to 8,192 patches, beyond which
    that function's float32 weights are rounded). For a map of zeros it is some bin centre,
    hence above every patch.
    """
    # Clamped as an integer: NaN from a non-finite map has no bin before that.
    bin_BN = (scaled_BN * BINS).to(torch.int64).clamp_(0, BINS - 1)
    one = scaled_BN.new_ones(()).expand_as(bin_BN)
    count_BV = scaled_BN.new_zeros(len(scaled_BN), BINS).scatter_add_(1, bin_BN, one)
    centre_V = (2 * torch.arange(BINS, device=scaled_BN.device) + 1).to(torch.float64) / (2 * BINS)

    weight_BV, moment_BV = count_BV.cumsum(1), (count_BV * centre_V).cumsum(1)
    below_BV, below_moment_BV = weight_BV[:, :-1], moment_BV[:, :-1]
    above_BV = weight_BV[:, -1:] - below_BV
    above_moment_BV = moment_BV[:, -1:] - below_moment_BV
    gap_BV = below_moment_BV / below_BV - above_moment_BV / above_BV
    return centre_V[(below_BV * above_BV * gap_BV.square()).argmax(dim=1)]


def _pad(values_BN: Shaped[Tensor, "B N"], grid: tuple[int, int]) -> Shaped[Tensor, "B P"]:
    """One empty column and row, so that no cell touches another row's far end or another image."""
    return F.pad(values_BN.unflatten(1, grid), (0, 1, 0, 1)).flatten(1)


def _component_roots(
    foreground_BP: Bool[Tensor, "B P"], grid: tuple[int, int]
) -> Int64[Tensor, "B P"]:
    """The first cell of every cell's 8-connected component; the last cell, P-1, for background.

    Every round hooks the root of each tree onto the smallest root that touches the tree, then
    flattens the trees by pointer jumping. The root is its tree's first cell.

    Number of rounds needed: after the first, a cell that is still a root has no earlier neighbour,
    so no two roots touch and there are at most ceil(h/2) * ceil(w/2). From then on, two rounds at
    least halve the roots of a component that still has several: a root that is not hooked is
    smaller than all that touch it; one of those hooks onto it, or onto a smaller one, to which it
    then hooks itself in the next round. A tree of P cells is flat after log2(P) jumps.
    """
    height, width = grid
    last = foreground_BP.shape[1] - 1
    rounds = 1 + 2 * ((-(-height // 2) * -(-width // 2)).bit_length() - 1)
    jumps = last.bit_length()

    cell_P = torch.arange(last + 1, device=foreground_BP.device)
    background_BP = torch.where(foreground_BP, 0, last)
    root_BP = torch.where(foreground_BP, cell_P, last)
    for _ in range(rounds):
        touching_BP = _smallest_around(root_BP, width + 1).maximum(background_BP)
        hooked_BP = root_BP.scatter_reduce(1, root_BP, touching_BP, "amin")
        for _ in range(jumps):
            before_BP, hooked_BP = hooked_BP, hooked_BP.gather(1, hooked_BP)
            if _known_equal(before_BP, hooked_BP):
                break
        before_BP, root_BP = root_BP, hooked_BP
        if _known_equal(before_BP, root_BP):
            break
    return root_BP


def _smallest_around(root_BP: Int64[Tensor, "B P"], pitch: int) -> Int64[Tensor, "B P"]:
    """The minimum over every cell and its 8 neighbours, `pitch` being the length of a padded row.

    The batch is treated as one long line: a neighbour is at a fixed distance, and cells across an
    edge are background, which is never smaller.
    """
    margin = pitch + 1
    line = F.pad(root_BP.flatten(), (margin, margin), value=root_BP.shape[1] - 1)
    beside = torch.minimum(line[:-2], line[1:-1]).minimum(line[2:])
    around = torch.minimum(beside[: -2 * pitch], beside[pitch:-pitch]).minimum(beside[2 * pitch :])
    return around.view_as(root_BP)


def _known_equal(one: Tensor, other: Tensor) -> bool:
    """Whether to stop early, if that can be known without waiting."""
    return _may_look(one) and torch.equal(one, other)


def _may_look(values: Tensor) -> bool:
    """On the CPU values can be inspected; asking a GPU would cost more than it saves."""
    return values.device.type == "cpu"
