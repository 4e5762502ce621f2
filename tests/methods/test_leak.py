"""No prediction depends on a pixel outside its context, and each depends on all inside it."""

from __future__ import annotations

import pytest
import torch

from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.model.vit import patchify
from dseqjepa.plans.plan import Plan, from_candidates, steps_of_ranks
from tests.tiny import float_images, tiny_config

LIVELY = 0.2


def lively(method: Method) -> Method:
    """Weights far from the initial ones, under which attention hardly mixes."""
    torch.manual_seed(1)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=LIVELY)
    return method.double()


def reach_SN(method: Method, images: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Largest gradient of each step's prediction with respect to each patch of its image."""
    images = images.clone().requires_grad_()
    prediction = method.predict(images, plan)
    rows = []
    for step in range(len(plan)):
        values = prediction.values_TD[prediction.row_T == step]
        weight = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).view_as(values)
        (gradient,) = torch.autograd.grad((values * weight).sum(), images, retain_graph=True)
        by_patch = patchify(gradient, method.encoder.patch_size).abs().amax(dim=2)
        others = torch.arange(len(images)) != plan.image_S[step]
        assert not by_patch[others].any(), "a prediction depends on another image"
        rows.append(by_patch[plan.image_S[step]])
    return torch.stack(rows)


def ranked_plan(prediction: str = "sequential") -> Plan:
    """Random regions of many sizes, one of a single patch, another number for each image."""
    generator = torch.Generator().manual_seed(0)
    rank_BN = torch.stack(
        [torch.randint(0, regions, (16,), generator=generator) for regions in (5, 3, 2, 5)]
    )
    rank_BN[:, 0] = 0
    rank_BN[3] = torch.tensor([0] + [1] * 7 + [2] + [3] * 3 + [4] * 4)
    return from_candidates(*steps_of_ranks(rank_BN, 4, prediction=prediction))


@pytest.mark.parametrize("attention", ["joint", "cross"])
@pytest.mark.parametrize("class_token", ["true", "false"])
@pytest.mark.parametrize("prediction", ["sequential", "flat"])
@pytest.mark.parametrize("context", ["prefix", "causal", "independent"])
def test_gradient_is_zero_outside_the_context_and_not_inside(
    context: str, prediction: str, class_token: str, attention: str
):
    config = tiny_config(
        "dseq_vitt8_64",
        f"method.context={context}",
        f"method.prediction={prediction}",
        f"model.class_token={class_token}",
        f"predictor.attention={attention}",
        "predictor.output_norm=" + ("true" if attention == "cross" else "false"),
        "method.saliency.kind=grad_cam",
    )
    plan = ranked_plan(prediction)
    reach = reach_SN(lively(build_method(config)), float_images(4).double(), plan)
    assert (reach[~plan.context_SN] == 0).all()
    assert (reach[plan.context_SN] > 0).all()


@pytest.mark.parametrize("kind", ["blocks", "scattered"])
@pytest.mark.parametrize("preset", ["ijepa_vitt8_64", "cjepa_vitt8_64"])
def test_the_random_masks_of_the_baselines_do_not_leak(preset: str, kind: str):
    method = lively(build_method(tiny_config(preset, f"method.blocks.kind={kind}")))
    images = float_images(4).double()
    plan = method.plan(images, progress=0.5, keys_B=torch.arange(4))
    assert len(plan) >= (12 if kind == "blocks" else 4)
    reach = reach_SN(method, images, plan)
    assert (reach[~plan.context_SN] == 0).all()
    assert (reach[plan.context_SN] > 0).all()


@pytest.mark.parametrize(
    ("saliency", "regions"),
    [("cls_similarity", "components"), ("rarity", "clusters"), ("rarity", "bands")],
)
@pytest.mark.parametrize("unit", ["image", "region", "batch"])
@pytest.mark.parametrize("context", ["prefix", "causal", "independent"])
def test_plans_that_the_method_draws_itself_do_not_leak(
    context: str, unit: str, saliency: str, regions: str
):
    config = tiny_config(
        "dseq_vitt8_64",
        f"method.context={context}",
        f"method.curriculum.unit={unit}",
        f"method.saliency.kind={saliency}",
        f"method.regions.kind={regions}",
        "method.regions.min_area=0.05",
    )
    method = lively(build_method(config))
    images = float_images(6).double()
    plan = method.plan(images, progress=0.5, keys_B=torch.arange(6))
    reach = reach_SN(method, images, plan)
    assert (reach[~plan.context_SN] == 0).all()
    assert (reach[plan.context_SN] > 0).all()


def test_a_patch_outside_every_context_may_hold_anything():
    """Not even a NaN gets through: such a patch is not in the encoder's input."""
    method = lively(build_method(tiny_config("dseq_vitt8_64")))
    images = float_images(4).double()
    plan = ranked_plan()
    clean = method.predict(images, plan).values_TD
    unseen = torch.ones(4, 16, dtype=torch.bool)
    for image, context in zip(plan.image_S, plan.context_SN, strict=True):
        unseen[image] &= ~context
    assert unseen.any(dim=1).all()
    pixels = unseen.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    poisoned = images.masked_fill(pixels, float("nan"))
    assert torch.equal(method.predict(poisoned, plan).values_TD, clean)
