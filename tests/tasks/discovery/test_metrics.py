"""The metrics equal scikit-learn's, or known values where it has none.

Suffixes: B images, P patches, T thresholds, O objects.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import fbeta_score, jaccard_score, roc_auc_score
from torch import Tensor

from dseqjepa.tasks.discovery import metrics

GRID = (5, 6)
NAN = float("nan")


def drawn(kind: str, images: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Maps with and without ties, object patches, and judged patches."""
    generator = torch.Generator().manual_seed(len(kind))
    P = GRID[0] * GRID[1]
    map_BP = torch.randn(images, P, generator=generator)
    if kind == "ties":
        map_BP = map_BP.mul(2).round()
    object_BP = torch.rand(images, P, generator=generator) < 0.3
    object_BP[:, :2] = torch.tensor([True, False])
    judged_BP = torch.rand(images, P, generator=generator) < 0.8
    judged_BP[:, :2] = True
    return map_BP, object_BP, judged_BP


@pytest.mark.parametrize("kind", ["smooth", "ties"])
def test_auc_is_that_of_scikit_learn(kind: str) -> None:
    maps = drawn(kind)
    wanted = [
        roc_auc_score(truth[judged], values[judged])
        for values, truth, judged in zip(*(x.numpy() for x in maps), strict=True)
    ]
    np.testing.assert_allclose(metrics.auc(*maps).numpy(), wanted, rtol=1e-12)


def test_auc_of_opposites_and_of_flat_maps() -> None:
    map_BP, object_BP, judged_BP = drawn("ties")
    turned_B = metrics.auc(-map_BP, object_BP, judged_BP)
    torch.testing.assert_close(turned_B, 1 - metrics.auc(map_BP, object_BP, judged_BP))
    flat_B = metrics.auc(torch.zeros_like(map_BP), object_BP, judged_BP)
    assert flat_B.tolist() == [0.5] * len(flat_B)
    known_B = metrics.auc(object_BP.float(), object_BP, judged_BP)
    assert known_B.tolist() == [1.0] * len(known_B)
    for nothing in (object_BP & False, object_BP | True):
        assert metrics.auc(map_BP, nothing, judged_BP).isnan().all()


def test_what_is_not_judged_changes_nothing() -> None:
    map_BP, object_BP, judged_BP = drawn("smooth")
    noise_BP = 100 * torch.randn(map_BP.shape, generator=torch.Generator().manual_seed(9))
    other_BP = torch.where(judged_BP, map_BP, noise_BP)
    turned_BP = torch.where(judged_BP, object_BP, ~object_BP)
    for metric in (metrics.auc, metrics.pointing):
        assert torch.equal(
            metric(map_BP, object_BP, judged_BP), metric(other_BP, turned_BP, judged_BP)
        )
    found_BP = map_BP > 0
    one_B = metrics.overlap(found_BP, object_BP, judged_BP)
    assert torch.equal(one_B, metrics.overlap(found_BP ^ ~judged_BP, turned_BP, judged_BP))


def test_pointing_at_the_highest_patch() -> None:
    map_BP = torch.tensor([[0.0, 3, 1, 2], [3, 0, 3, 0], [1, 1, 1, 1], [9, 5, 0, 0], [0, 1, 0, 0]])
    object_BP = torch.tensor(
        [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    ).bool()
    judged_BP = torch.ones_like(object_BP)
    judged_BP[3, 0] = False
    hit_B = metrics.pointing(map_BP, object_BP, judged_BP)
    assert hit_B[:4].tolist() == [1.0, 0.5, 0.25, 1.0]
    assert hit_B[4].isnan()


@pytest.mark.parametrize("kind", ["smooth", "ties"])
def test_f_is_that_of_scikit_learn_at_every_threshold(kind: str) -> None:
    map_BP, object_BP, judged_BP = drawn(kind, images=4)
    f_BT = metrics.f_curve(map_BP, object_BP, judged_BP, thresholds=17)
    scaled_BP = metrics.scaled(map_BP)
    assert scaled_BP.amin(1).eq(0).all()
    assert scaled_BP.amax(1).eq(1).all()
    for b in range(4):
        truth, values = object_BP[b][judged_BP[b]], scaled_BP[b][judged_BP[b]]
        wanted = [
            fbeta_score(truth, values >= at, beta=math.sqrt(0.3), zero_division=0.0)
            for at in np.linspace(0, 1, 17)
        ]
        np.testing.assert_allclose(f_BT[b].numpy(), wanted, rtol=1e-12)


def test_iou_is_that_of_scikit_learn() -> None:
    map_BP, object_BP, judged_BP = drawn("smooth")
    found_BP = map_BP > 0.4
    wanted = [
        jaccard_score(truth[judged], found[judged])
        for found, truth, judged in zip(found_BP, object_BP, judged_BP, strict=True)
    ]
    np.testing.assert_allclose(metrics.overlap(found_BP, object_BP, judged_BP).numpy(), wanted)


def test_the_box_is_that_of_the_component_with_the_highest_patch() -> None:
    foreground_HW = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [1, 0, 0, 0, 0, 0],
        ]
    ).bool()
    map_HW = foreground_HW.float()
    map_HW[3, 3] = 2
    box_4 = metrics.seed_box(foreground_HW.flatten(), map_HW.flatten(), GRID)
    assert box_4 is not None
    assert box_4.tolist() == [1, 3, 4, 5]
    map_HW[0, 5] = 3  # not in the foreground
    assert metrics.seed_box(foreground_HW.flatten(), map_HW.flatten(), GRID) is None
    boxes_O4 = torch.tensor([[1.0, 3, 4, 5], [1, 4, 4, 6], [0, 0, 1, 2], [1, 3, 4, 8]])
    assert metrics.box_ious(box_4, boxes_O4).tolist() == pytest.approx([1, 1 / 3, 0, 0.4])


def test_corloc_counts_an_iou_of_half_with_any_object() -> None:
    foreground_BP = torch.zeros(4, 30, dtype=torch.bool)
    foreground_BP[:3, [0, 1, 6, 7]] = True
    boxes = [
        torch.tensor([[4.0, 4, 5, 5], [0, 0, 2, 4]]),  # half: found
        torch.tensor([[0.0, 0, 2, 5]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0, 2, 2]]),  # no foreground
    ]
    found_B = metrics.corloc(foreground_BP, foreground_BP.float(), boxes, GRID)
    assert found_B[[0, 1, 3]].tolist() == [1, 0, 0]
    assert found_B[2].isnan()


def test_regions_against_an_object_on_paper() -> None:
    """Six patches: region 0 has two, of which the object covers one and a half; region 1 has one,
    covered by half; three quarters of the last patch are not known."""
    rank_BP = torch.tensor([[0, 0, 1, 2, 2, 2]])
    cover_BP = torch.tensor([[1.0, 0.5, 0.5, 0.0, 0.0, 0.0]])
    known_BP = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.25]])
    assert metrics.areas(rank_BP, 4).tolist() == [pytest.approx([1 / 3, 1 / 6, 1 / 2, 0])]
    assert metrics.on_object(rank_BP, cover_BP, known_BP).tolist() == [0.75]
    assert metrics.on_object(rank_BP, cover_BP, known_BP, rank=1).tolist() == [0.5]
    iou_B, best_B = metrics.best_region(rank_BP, cover_BP, known_BP, 4)
    assert iou_B.tolist() == pytest.approx([1.5 / 2.5])
    assert best_B.tolist() == [0]
    whole_B, last_B = metrics.best_region(rank_BP, (rank_BP == 2) * known_BP, known_BP, 4)
    assert (whole_B.tolist(), last_B.tolist()) == ([1.0], [2.0])
    nothing_BP = torch.zeros_like(cover_BP)
    assert metrics.on_object(rank_BP, nothing_BP, known_BP).isnan().all()
    assert all(x.isnan().all() for x in metrics.best_region(rank_BP, nothing_BP, known_BP, 4))
    map_BP = torch.tensor([[4.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    assert metrics.region_means(map_BP, rank_BP).tolist() == [0.75]


def test_the_best_region_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(3)
    rank_BP = torch.randint(0, 5, (20, 30), generator=generator)
    object_BP = (torch.rand(20, 30, generator=generator) < 0.3).float()
    iou_B, best_B = metrics.best_region(rank_BP, object_BP, torch.ones_like(object_BP), 5)
    for b in range(20):
        truth = object_BP[b].bool().numpy()
        each = [jaccard_score(truth, (rank_BP[b] == k).numpy()) for k in range(5)]
        assert iou_B[b].item() == pytest.approx(max(each))
        assert best_B[b].item() == int(np.argmax(each))


def test_calibration_error_on_paper() -> None:
    confidence_N = torch.tensor([0.05, 0.95, 0.95, 1.0], dtype=torch.float64)
    right_N = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    weight_RN = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 2, 0, 2]], dtype=torch.float64)
    error_R = metrics.calibration_error(confidence_N, right_N, weight_RN)
    last = abs(0.95 + 0.95 + 1.0 - 2) / 4
    assert error_R.tolist() == pytest.approx([0.05 / 4 + last, 0.05, 0.025])


def test_a_confidence_that_is_the_frequency_has_no_error() -> None:
    right_N = torch.tensor([1.0, 0, 0, 0, 1, 1], dtype=torch.float64)
    confidence_N = torch.tensor([0.25, 0.25, 0.25, 0.25, 1, 1], dtype=torch.float64)
    one_1N = torch.ones(1, 6, dtype=torch.float64)
    assert metrics.calibration_error(confidence_N, right_N, one_1N).item() == pytest.approx(0)
    assert metrics.calibration_error(1 - right_N, right_N, one_1N).item() == 1.0
