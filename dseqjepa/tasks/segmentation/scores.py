"""mIoU from pixel counts, with intervals.

Suffixes: N images, K classes, H and W pixels, R resamples, J the three counts of a class (right,
predicted, true).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, Num
from torch import Tensor

from dseqjepa.tasks.bootstrap import interval, resample_weights


def confusion(
    predicted_HW: Int64[Tensor, "H W"], label_HW: Int64[Tensor, "H W"], classes: int
) -> Int64[Tensor, "K K"]:
    """Pixel counts by true class (row) and predicted class (column), both 1 to K; label 0 is
    ignored."""
    known = label_HW > 0
    pair = (label_HW[known] - 1) * classes + predicted_HW[known] - 1
    return pair.bincount(minlength=classes**2).view(classes, classes)


def counts_of(confusion_KK: Int64[Tensor, "K K"]) -> Int64[Tensor, "J K"]:
    """Per class the numbers of correctly predicted, predicted and true pixels: all that IoU needs,
    and small enough to keep for every image."""
    return torch.stack([confusion_KK.diagonal(), confusion_KK.sum(0), confusion_KK.sum(1)])


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a test set, as shares of 1; (low, high) are 95 % bootstrap intervals."""

    miou: float
    miou_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]
    iou_K: Float[Tensor, " K"]
    """IoU per class; NaN for a class that does not occur."""

    def by_class(self, names: Sequence[str]) -> dict[str, float | None]:
        """IoU per class by name, in per cent; None for a class that does not occur."""
        pairs = zip(names, self.iou_K.tolist(), strict=True)
        return {name: None if math.isnan(iou) else 100 * iou for name, iou in pairs}


def score(counts_NJK: Int64[Tensor, "N J K"], seed: int) -> Scores:
    """IoU of each class over all pixels of all images, and its mean over the classes that occur in
    the truth or the prediction of some labelled pixel.

    Intervals resample images with replacement and sum their counts.
    """
    flat_RX = resampled(counts_NJK.flatten(1), seed)
    counts_RJK = flat_RX.unflatten(1, counts_NJK.shape[1:])
    mious_R, accuracies_R = _means(counts_RJK)
    whole_1JK = counts_NJK.sum(0, keepdim=True).double()
    (miou,), (accuracy,) = (values.tolist() for values in _means(whole_1JK))
    ious_1K = _ious(whole_1JK)
    return Scores(miou, interval(mious_R), accuracy, interval(accuracies_R), ious_1K[0])


def resampled(counts_NX: Num[Tensor, "N X"], seed: int) -> Float64[Tensor, "R X"]:
    """Sums over resampled images, drawn with replacement; a function of the seed."""
    # Integers below 2**53 are exact in float64.
    return resample_weights(len(counts_NX), seed) @ counts_NX.double()


def _ious(counts_RJK: Tensor) -> Tensor:
    right_RK, predicted_RK, true_RK = counts_RJK.unbind(1)
    return right_RK / (predicted_RK + true_RK - right_RK)


def _means(counts_RJK: Tensor) -> tuple[Tensor, Tensor]:
    right_RK, _, true_RK = counts_RJK.unbind(1)
    return _ious(counts_RJK).nanmean(1), right_RK.sum(1) / true_RK.sum(1)
