"""From maps and truth to metrics: per image, then for a test set with intervals.

Suffixes: B or N images (N where they are those of a test set), P patches of a grid, T thresholds,
K ranks, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from dseqjepa.config import RegionsConfig
from dseqjepa.plans.regions import Regions, otsu_foreground, rank_regions
from dseqjepa.tasks.bootstrap import interval
from dseqjepa.tasks.discovery import metrics
from dseqjepa.tasks.discovery.maps import SaliencyMap
from dseqjepa.tasks.discovery.truth import MOST, Truth
from dseqjepa.tasks.results import Metric

MAP_METRICS = ("auc", "pointing", "corloc", "max_f", "iou")
REGION_METRICS = (
    "regions", "region_area", "region1_on_object", "best_iou", "best_iou_rank", "ece",
    "one_patch_regions",
)  # fmt: skip
PLAIN = frozenset({"regions", "best_iou_rank"})
"""Metrics that are not in per cent."""

Measures = dict[str, Tensor]
"""Measurements of each image of a batch, with images as the first axis."""
Weights = Float64[Tensor, "R N"]


def measure_map(seen: SaliencyMap, truth: Truth, grid: tuple[int, int]) -> Measures:
    """The ingredients of `MAP_METRICS`."""
    map_BP, object_BP, judged_BP = seen.saliency_BP, truth.object_BP, truth.judged_BP
    foreground_BP = otsu_foreground(map_BP)
    return {
        "auc": metrics.auc(map_BP, object_BP, judged_BP),
        "pointing": metrics.pointing(map_BP, object_BP, judged_BP),
        "corloc": metrics.corloc(foreground_BP, map_BP, truth.boxes, grid),
        "max_f": metrics.f_curve(map_BP, object_BP, judged_BP),
        "iou": metrics.overlap(foreground_BP, object_BP, judged_BP),
    }


def cut_regions(seen: SaliencyMap, grid: tuple[int, int], how: RegionsConfig) -> Regions:
    """Errors are those of `rank_regions`."""
    return rank_regions(
        seen.saliency_BP,
        grid,
        how.count,
        how.min_area,
        kind=how.kind,
        features_BND=seen.features_BPD,
    )


def measure_regions(
    seen: SaliencyMap, truth: Truth, grid: tuple[int, int], how: RegionsConfig
) -> Measures:
    """The ingredients of `REGION_METRICS`."""
    found = cut_regions(seen, grid, how)
    rank_BP, most = found.rank_BN, found.most
    area_BK = metrics.areas(rank_BP, most)
    share_B = metrics.on_object(rank_BP, truth.cover_BP, truth.known_BP)
    iou_B, best_B = metrics.best_region(rank_BP, truth.main_BP, truth.known_BP, most)
    single_BK = (area_BK * rank_BP.shape[1]).round() == 1
    return {
        "regions": found.count_B.double(),
        "region_area": area_BK[:, 0],
        "areas": area_BK,
        "region1_on_object": share_B,
        "best_iou": iou_B,
        "best_iou_rank": best_B,
        "confidence": metrics.region_means(seen.saliency_BP, rank_BP),
        "right": (share_B > MOST).double().masked_fill(share_B.isnan(), torch.nan),
        "one_patch_regions": single_BK.sum(1).double() / found.count_B,
    }


def summarise(names: Sequence[str], found: Measures, weight_RN: Weights) -> dict[str, Metric]:
    """Metrics of a test set, shares in per cent; those defined for no image are left out."""
    special: Mapping[str, Callable[[Measures, Weights], Tensor]] = {
        "max_f": lambda found, weight: _means(found["max_f"], weight).amax(1),
        "ece": _calibration_error,
    }
    summary = {}
    one_1N = torch.ones_like(weight_RN[:1])
    for name in names:
        of = special.get(name, lambda found, weight, name=name: _means(found[name], weight))
        (value,) = of(found, one_1N).tolist()
        if math.isfinite(value):
            scale = 1 if name in PLAIN else 100
            low, high = interval(of(found, weight_RN))
            summary[name] = Metric(scale * value, scale * low, scale * high)
    return summary


def _means(values_N: Tensor, weight_RN: Weights) -> Tensor:
    """The weighted mean over images for which the value is defined; trailing axes are kept."""
    known_N = values_N.isfinite().double()
    return weight_RN @ values_N.double().nan_to_num(0.0) / (weight_RN @ known_N)


def _calibration_error(found: Measures, weight_RN: Weights) -> Tensor:
    known_N = found["right"].isfinite()
    return metrics.calibration_error(
        found["confidence"][known_N], found["right"][known_N], weight_RN[:, known_N]
    )
