"""How well maps mark objects, and how well regions separate them: formulas on tensors.

Everything is at patch resolution. In an *object patch*, objects cover more than half of the known
area; patches with at most half of their area known are not scored (`judged_BN`).
Undefined metrics are NaN.

Suffixes: B or N images (N where they are those of a test set), P patches of a grid (row-major),
T thresholds, K regions, O objects of one image, R resamples, 4 (top, left, bottom, right) in
patches, the end exclusive.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from scipy import ndimage
from torch import Tensor

THRESHOLDS = 256
BETA_SQUARED = 0.3
"""Beta squared of the F-measure, as in salient-object detection (Achanta et al., 2009)."""
BINS = 10
FOUND = 0.5
"""Minimum IoU of a box that counts as an object's (CorLoc, Deselaers et al., 2010)."""

Map = Float[Tensor, "B P"]
Mask = Bool[Tensor, "B P"]
PerImage = Float64[Tensor, " B"]


def scaled(map_BP: Map) -> Float64[Tensor, "B P"]:
    """Each map scaled to [0, 1]; a flat map becomes 0."""
    low_B1, high_B1 = map_BP.double().aminmax(dim=1, keepdim=True)
    return (map_BP.double() - low_B1) / torch.where(high_B1 > low_B1, high_B1 - low_B1, 1.0)


def auc(map_BP: Map, object_BP: Mask, judged_BP: Mask) -> PerImage:
    """The share of (object patch, other patch) pairs in which the object patch has the higher
    value; ties count half. NaN if an image has only one kind."""
    positive_BP, negative_BP = object_BP & judged_BP, ~object_BP & judged_BP
    # Unscored patches come last and so do not change the ranks of the others.
    value_BP = map_BP.double().masked_fill(~judged_BP, torch.inf)
    sorted_BP = value_BP.sort(dim=1).values
    below_BP = torch.searchsorted(sorted_BP, value_BP)
    upto_BP = torch.searchsorted(sorted_BP, value_BP, right=True)
    rank_BP = (below_BP + upto_BP + 1).double() / 2
    positives_B, negatives_B = positive_BP.sum(1).double(), negative_BP.sum(1).double()
    sum_B = (rank_BP * positive_BP).sum(1)
    return (sum_B - positives_B * (positives_B + 1) / 2) / (positives_B * negatives_B)


def pointing(map_BP: Map, object_BP: Mask, judged_BP: Mask) -> PerImage:
    """Whether the highest patch is an object patch (the pointing game, Zhang et al., 2016); for
    ties, the share that is. NaN without object patches."""
    value_BP = map_BP.double().masked_fill(~judged_BP, -torch.inf)
    highest_BP = (value_BP == value_BP.amax(dim=1, keepdim=True)) & judged_BP
    hit_B = (highest_BP & object_BP).sum(1).double() / highest_BP.sum(1)
    return _where_objects(hit_B, object_BP & judged_BP)


def f_curve(
    map_BP: Map, object_BP: Mask, judged_BP: Mask, thresholds: int = THRESHOLDS
) -> Float64[Tensor, "B T"]:
    """The F-measure (beta squared 0.3) of the patches at or above each of `thresholds` values from
    0 to 1 of the map scaled to [0, 1]. Max-F is the highest mean over images of one threshold."""
    scaled_BP = scaled(map_BP)
    at_T = torch.linspace(0, 1, thresholds, dtype=torch.float64, device=map_BP.device)
    positive_BP = object_BP & judged_BP
    found_BT = _counts_from(scaled_BP, judged_BP, at_T)
    right_BT = _counts_from(scaled_BP, positive_BP, at_T)
    # (1 + b) P R / (b P + R) with P = right / found and R = right / positives.
    positives_B1 = positive_BP.sum(1, keepdim=True).double()
    f_BT = (1 + BETA_SQUARED) * right_BT / (BETA_SQUARED * positives_B1 + found_BT)
    return _where_objects(f_BT, positive_BP)


def _counts_from(
    scaled_BP: Float64[Tensor, "B P"], chosen_BP: Mask, at_T: Float64[Tensor, " T"]
) -> Float64[Tensor, "B T"]:
    """How many of the selected patches are at or above each threshold."""
    sorted_BP = scaled_BP.masked_fill(~chosen_BP, -1.0).sort(dim=1).values
    at_BT = at_T.expand(len(sorted_BP), -1).contiguous()
    return (sorted_BP.shape[1] - torch.searchsorted(sorted_BP, at_BT)).double()


def overlap(found_BP: Mask, object_BP: Mask, judged_BP: Mask) -> PerImage:
    """IoU of the found patches and the object patches; NaN without object patches."""
    both_B = (found_BP & object_BP & judged_BP).sum(1).double()
    either_B = ((found_BP | object_BP) & judged_BP).sum(1)
    return _where_objects(both_B / either_B, object_BP & judged_BP)


def corloc(
    foreground_BP: Mask,
    map_BP: Map,
    boxes: list[Float[Tensor, "_ 4"]],
    grid: tuple[int, int],
) -> PerImage:
    """Whether the box around the foreground component with the map's highest patch has an
    IoU of at least 0.5 with the box of some object; 0 without foreground, NaN without objects."""
    found = []
    for foreground_P, map_P, boxes_O4 in zip(foreground_BP, map_BP, boxes, strict=True):
        box_4 = seed_box(foreground_P, map_P, grid)
        if len(boxes_O4) == 0:
            found.append(float("nan"))
        elif box_4 is None:
            found.append(0.0)
        else:
            found.append(float(box_ious(box_4, boxes_O4).max() >= FOUND))
    return torch.tensor(found, dtype=torch.float64)


def seed_box(
    foreground_P: Bool[Tensor, " P"], map_P: Float[Tensor, " P"], grid: tuple[int, int]
) -> Float[Tensor, " 4"] | None:
    """The box of the 8-connected component with the highest patch; None if that is not
    foreground."""
    label_HW, _ = ndimage.label(foreground_P.view(grid).cpu().numpy(), structure=np.ones((3, 3)))
    label = int(label_HW.reshape(-1)[int(map_P.argmax())])
    if label == 0:
        return None
    rows, columns = ndimage.find_objects(label_HW)[label - 1]
    corners = (rows.start, columns.start, rows.stop, columns.stop)
    return torch.tensor(corners, dtype=torch.float32)


def box_ious(box_4: Float[Tensor, " 4"], boxes_O4: Float[Tensor, "O 4"]) -> Float[Tensor, " O"]:
    low_O2, high_O2 = boxes_O4[:, :2].maximum(box_4[:2]), boxes_O4[:, 2:].minimum(box_4[2:])
    both_O = (high_O2 - low_O2).clamp(min=0).prod(1)
    areas_O = (boxes_O4[:, 2:] - boxes_O4[:, :2]).prod(1)
    return both_O / ((box_4[2:] - box_4[:2]).prod() + areas_O - both_O)


def areas(rank_BP: Int64[Tensor, "B P"], most: int) -> Float64[Tensor, "B K"]:
    """The share of the grid that each rank covers, 0 for ranks that an image lacks."""
    return F.one_hot(rank_BP, most).double().mean(1)


def on_object(
    rank_BP: Int64[Tensor, "B P"], cover_BP: Map, known_BP: Map, rank: int = 0
) -> PerImage:
    """The share of a region's known area that objects cover; NaN if none of it is known, or the
    image has no object."""
    inside_BP = rank_BP == rank
    share_B = (cover_BP * inside_BP).double().sum(1) / (known_BP * inside_BP).double().sum(1)
    return _where_objects(share_B, cover_BP > 0)


def best_region(
    rank_BP: Int64[Tensor, "B P"], object_BP: Map, known_BP: Map, most: int
) -> tuple[PerImage, PerImage]:
    """The highest IoU of a region with an object, by area, and that region's rank, from 0.

    Args:
        object_BP: the share of each patch that the object covers.
        known_BP: the share of which this is known.
    """
    inside_BPK = F.one_hot(rank_BP, most).double()
    both_BK = (inside_BPK * object_BP.double()[:, :, None]).sum(1)
    area_BK = (inside_BPK * known_BP.double()[:, :, None]).sum(1)
    own_B1 = object_BP.double().sum(1, keepdim=True)
    iou_B, rank_B = (both_BK / (area_BK + own_B1 - both_BK)).nan_to_num(0.0).max(dim=1)
    return (
        _where_objects(iou_B, object_BP > 0),
        _where_objects(rank_B.double(), object_BP > 0),
    )


def region_means(map_BP: Map, rank_BP: Int64[Tensor, "B P"], rank: int = 0) -> PerImage:
    """The mean of the map, scaled to [0, 1], over a region (eq. 3); a flat map is 0."""
    inside_BP = rank_BP == rank
    return (scaled(map_BP) * inside_BP).sum(1) / inside_BP.sum(1)


def calibration_error(
    confidence_N: Float64[Tensor, " N"],
    right_N: Float64[Tensor, " N"],
    weight_RN: Float64[Tensor, "R N"],
) -> Float64[Tensor, " R"]:
    """Expected calibration error (Naeini et al., 2015) with `BINS` equal-width bins, for each
    weighting of the images: the mean distance between a bin's confidence and its accuracy."""
    bin_N = (confidence_N * BINS).long().clamp(0, BINS - 1)
    gap_NK = F.one_hot(bin_N, BINS).double() * (confidence_N - right_N)[:, None]
    return (weight_RN @ gap_NK).abs().sum(1) / weight_RN.sum(1)


def _where_objects(values: Tensor, object_BP: Mask) -> Tensor:
    """NaN for images without anything to find."""
    any_B = object_BP.any(1)
    return values.masked_fill(~any_B.view(-1, *[1] * (values.ndim - 1)), torch.nan)
