"""A plan's invariants: what each step sees and predicts."""

from __future__ import annotations

import pytest
import torch

from dseqjepa.plans.plan import Plan, from_candidates, paint, steps_of_ranks


def random_ranks(images: int = 50, patches: int = 24, regions: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    count_B = torch.randint(1, regions + 1, (images, 1), generator=generator)
    rank_BN = torch.randint(0, 1000, (images, patches), generator=generator) % count_B
    rank_BN[:, :1] = 0  # the first region is never empty
    return rank_BN


def test_step_k_sees_regions_1_to_k_and_predicts_the_next():
    """Equation 5; the release sees one region too few from the second step on."""
    rank_BN = random_ranks()
    plan = from_candidates(*steps_of_ranks(rank_BN, 4))
    assert len(plan) > 100
    for image, step, context_N, target_N in zip(
        plan.image_S, plan.step_S, plan.context_SN, plan.target_SN, strict=True
    ):
        union_N = torch.zeros_like(context_N)
        for region in range(int(step)):
            union_N |= rank_BN[image] == region
        assert torch.equal(context_N, union_N)
        assert torch.equal(target_N, rank_BN[image] == step)


def test_five_regions_have_growing_contexts_and_the_release_lags_by_one():
    rank_BN = torch.arange(5)[None]
    right, _ = steps_of_ranks(rank_BN, 4)
    assert right[0].sum(dim=1).tolist() == [1, 2, 3, 4]
    late, _ = steps_of_ranks(rank_BN, 4, lag=1)
    assert late[0].sum(dim=1).tolist() == [1, 1, 2, 3]


def test_flat_prediction_sees_the_first_region_only():
    rank_BN = random_ranks()
    plan = from_candidates(*steps_of_ranks(rank_BN, 4, prediction="flat"))
    assert torch.equal(plan.context_SN, rank_BN[plan.image_S] == 0)


def test_contexts_and_targets_are_disjoint_and_not_empty():
    plan = from_candidates(*steps_of_ranks(random_ranks(), 4))
    assert not (plan.context_SN & plan.target_SN).any()
    assert plan.context_SN.any(dim=1).all()
    assert plan.target_SN.any(dim=1).all()


def test_a_step_without_context_or_target_is_dropped_and_numbers_stay():
    context = torch.tensor([[[1, 0], [0, 0], [1, 0], [1, 0]]], dtype=torch.bool)
    target = torch.tensor([[[0, 1], [0, 1], [0, 0], [0, 1]]], dtype=torch.bool)
    plan = from_candidates(context, target)
    assert plan.step_S.tolist() == [1, 4]


def test_equal_contexts_of_one_image_are_shared_and_of_two_images_are_not():
    context = torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]], dtype=torch.bool)
    plan = Plan(torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 3, 1]), context, ~context)
    assert plan.context_of_S.tolist() == [0, 0, 1, 2]


def test_paint_gives_a_patch_to_the_first_mask_that_holds_it():
    mask = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0]]], dtype=torch.bool)
    assert paint(mask).tolist() == [[0, 0, 1, 2]]


def test_painted_ranks_of_disjoint_masks_are_the_masks():
    rank_BN = random_ranks()
    mask_BKN = rank_BN[:, None] == torch.arange(5)[None, :, None]
    assert torch.equal(paint(mask_BKN), rank_BN)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_no_step_sees_its_own_target_or_a_later_region(lag: int):
    rank_BN = random_ranks()
    context, target = steps_of_ranks(rank_BN, 4, lag=lag)
    for step in range(4):
        seen = torch.where(context[:, step], rank_BN, -1).amax(dim=1)
        assert (seen < step + 1).all()
        assert not (context[:, step] & target[:, step]).any()
