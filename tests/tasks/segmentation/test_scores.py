"""mIoU against scikit-learn, and for predictors with a known score."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torch import Tensor

from dseqjepa.tasks.segmentation.scores import confusion, counts_of, score

K = 5


def maps(count: int = 6, seed: int = 0, classes: int = K) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes + 1, (count, 20, 30), generator=generator)


def counts(predicted: Tensor, label: Tensor) -> Tensor:
    pairs = zip(predicted, label, strict=True)
    return torch.stack([counts_of(confusion(p, t, K)) for p, t in pairs])


def test_ground_truth_has_everything_right() -> None:
    label = maps()
    found = score(counts(label.clamp(min=1), label), seed=0)
    assert (found.miou, found.accuracy) == (1.0, 1.0)
    assert found.miou_interval == found.accuracy_interval == (1.0, 1.0)
    assert found.iou_K.tolist() == [1.0] * K


@pytest.mark.parametrize("absent", [False, True])
def test_it_equals_scikit_learn(absent: bool) -> None:
    """With ignored pixels, and with a class that neither labels nor predictions have."""
    classes = K - absent
    label, predicted = maps(seed=1, classes=classes), maps(seed=2, classes=classes).clamp(min=1)
    found = score(counts(predicted, label), seed=0)
    pair = label[label > 0].numpy(), predicted[label > 0].numpy()
    present = list(range(1, classes + 1))
    per_class = jaccard_score(*pair, labels=present, average=None)
    assert found.miou == pytest.approx(per_class.mean(), rel=1e-6)
    assert found.iou_K.tolist()[:classes] == pytest.approx(per_class.tolist(), rel=1e-6)
    assert math.isnan(found.iou_K[-1]) == absent
    assert found.accuracy == pytest.approx(accuracy_score(*pair), rel=1e-6)
    whole = sum(confusion(p, t, K) for p, t in zip(predicted, label, strict=True))
    assert whole.dtype == torch.int64
    assert whole.tolist() == confusion_matrix(*pair, labels=list(range(1, K + 1))).tolist()


def test_a_constant_predictor_has_one_class_as_often_as_it_occurs() -> None:
    label = maps()
    share = [float((label == k).sum() / (label > 0).sum()) for k in range(1, K + 1)]
    for k in range(1, K + 1):
        found = score(counts(torch.full_like(label, k), label), seed=0)
        assert found.accuracy == pytest.approx(share[k - 1])
        assert found.miou == pytest.approx(share[k - 1] / K)


def test_a_random_predictor_is_right_where_chance_is() -> None:
    """Each class for a share 1/K of all pixels: IoU f/K over f + 1/K - f/K."""
    generator = torch.Generator().manual_seed(3)
    label = torch.multinomial(
        torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), 400_000, True, generator=generator
    ).view(4, 250, 400) + 1  # fmt: skip
    predicted = torch.randint(1, K + 1, label.shape, generator=generator)
    found = score(counts(predicted, label), seed=0)
    wanted = [(f / K) / (f + 1 / K - f / K) for f in (0.4, 0.3, 0.15, 0.1, 0.05)]
    assert found.miou == pytest.approx(sum(wanted) / K, abs=0.002)
    assert found.accuracy == pytest.approx(1 / K, abs=0.003)


def test_intervals_are_those_of_whole_images_drawn_again() -> None:
    """Against resampling by hand, and about as wide as the standard error says."""
    label, predicted = maps(60, seed=4), maps(60, seed=5).clamp(min=1)
    right = torch.rand(60, 1, 1, generator=torch.Generator().manual_seed(6))
    draw = torch.rand(label.shape, generator=torch.Generator().manual_seed(7))
    predicted = torch.where(draw < right, label.clamp(min=1), predicted)
    found = score(counts(predicted, label), seed=0)
    assert found.miou_interval[0] < found.miou < found.miou_interval[1]
    per_image = [float(((p == t) & (t > 0)).sum() / (t > 0).sum())
                 for p, t in zip(predicted, label, strict=True)]  # fmt: skip
    error = torch.tensor(per_image).std().item() / 60**0.5
    low, high = found.accuracy_interval
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    again = score(counts(predicted, label), seed=0)
    assert again.miou_interval == found.miou_interval
    assert score(counts(predicted, label), seed=1).miou_interval != found.miou_interval
