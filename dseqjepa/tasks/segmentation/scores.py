"""mIoU by counts of pixels, and how sure it is.

Suffixes: N images, K classes, H and W pixels, R resamples, J the three counts of a class (right,
predicted, true).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, Num
from torch import Tensor

from dseqjepa.tasks.bootstrap import RESAMPLES, interval, resample_weights


def confusion(
    predicted_HW: Int64[Tensor, "H W"], label_HW: Int64[Tensor, "H W"], classes: int
) -> Int64[Tensor, "K K"]:
    """Pixels by true class (row) and predicted class (column), both 1 to K; where the label is 0
    nothing counts."""
    known = label_HW > 0
    pair = (label_HW[known] - 1) * classes + predicted_HW[known] - 1
    return pair.bincount(minlength=classes**2).view(classes, classes)


def counts_of(confusion_KK: Int64[Tensor, "K K"]) -> Int64[Tensor, "J K"]:
    """Of each class the pixels that are rightly predicted, predicted, and there: all that IoU
    needs, and little enough to be kept for every image."""
    return torch.stack([confusion_KK.diagonal(), confusion_KK.sum(0), confusion_KK.sum(1)])


@dataclass(frozen=True, eq=False)
class Scores:
    """Of a test set, as shares of 1; (low, high) are 95 % bootstrap intervals over its images."""

    miou: float
    miou_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]
    iou_K: Float[Tensor, " K"]
    """NaN for a class that does not occur."""


def score(counts_NJK: Int64[Tensor, "N J K"], seed: int, resamples: int = RESAMPLES) -> Scores:
    """IoU of each class over all pixels of all images, and its mean over classes that occur: which
    some image has, or a prediction claims, in a pixel that is not ignored.

    The intervals resample images with replacement and add up their counts.
    """
    flat_RX = resampled(counts_NJK.flatten(1), seed, resamples)
    counts_RJK = flat_RX.unflatten(1, counts_NJK.shape[1:])
    mious_R, accuracies_R = _means(counts_RJK)
    whole_1JK = counts_NJK.sum(0, keepdim=True).double()
    (miou,), (accuracy,) = (values.tolist() for values in _means(whole_1JK))
    return Scores(
        miou,
        interval(mious_R),
        accuracy,
        interval(accuracies_R),
        _ious(whole_1JK)[0],
    )


def resampled(
    counts_NX: Num[Tensor, "N X"], seed: int, resamples: int = RESAMPLES
) -> Float64[Tensor, "R X"]:
    """Sums over as many images as there are, drawn with replacement; a function of the seed."""
    # Whole numbers below 2**53 are exact in float64.
    return resample_weights(len(counts_NX), seed, resamples) @ counts_NX.double()


def _ious(counts_RJK: Tensor) -> Tensor:
    right_RK, predicted_RK, true_RK = counts_RJK.unbind(1)
    return right_RK / (predicted_RK + true_RK - right_RK)


def _means(counts_RJK: Tensor) -> tuple[Tensor, Tensor]:
    right_RK, _, true_RK = counts_RJK.unbind(1)
    return _ious(counts_RJK).nanmean(1), right_RK.sum(1) / true_RK.sum(1)
