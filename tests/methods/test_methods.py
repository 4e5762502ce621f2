"""What each method plans and what its step computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dseqjepa as dj
from dseqjepa.methods import build_method
from dseqjepa.model.look import Look, target_features
from dseqjepa.model.windows import draw_windows, sample_tokens, sample_windows
from dseqjepa.plans.blocks import sample_blocks
from dseqjepa.plans.plan import Plan
from dseqjepa.plans.regions import rank_regions
from tests.tiny import PAPER, float_images, tiny_config

GRID = (8, 8)
KEYS = torch.arange(400)
SMOOTH = F.interpolate(
    torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(3)), size=GRID, mode="bicubic"
).flatten(1)


def drawn(progress: float, *overrides: str, preset: str = "dseq_vitt8_64", keys=KEYS):  # type: ignore[no-untyped-def]
    paper = PAPER if preset.startswith("dseq") else ()
    config = tiny_config(
        preset, "data.image_size=64", "method.regularizer=none", *paper, *overrides
    )
    method = build_method(config)
    sight = Look(torch.zeros(len(keys), 64, 32), SMOOTH[: len(keys)])
    return method.draw(sight, GRID, progress, keys)


def steps_of(plan: Plan, image: int) -> tuple[torch.Tensor, torch.Tensor]:
    mine = plan.image_S == image
    return plan.context_SN[mine], plan.target_SN[mine]


def test_ijepa_predicts_each_block_from_one_context():
    plan = drawn(0.3, preset="ijepa_vitt8_64").plan
    blocks = sample_blocks(KEYS, GRID)
    for image in range(50):
        context, target = steps_of(plan, image)
        assert torch.equal(context, blocks.context_BN[image].expand(4, -1))
        assert torch.equal(target, blocks.target_BMN[image])
    assert plan.context_of_S[-1] == len(KEYS) - 1, "each image's context is encoded once"


def test_ranked_regions_are_predicted_in_order_of_saliency():
    plan = drawn(1.0).plan
    regions = rank_regions(SMOOTH, GRID, 5, 0.05)
    assert (regions.count_B > 2).sum() > 100
    area = sum(float((rank_N == 0).sum()) / 64 for rank_N in regions.rank_BN) / len(regions.rank_BN)
    assert drawn(1.0).metrics["region_area"].item() == pytest.approx(area)
    for image in range(100):
        context, target = steps_of(plan, image)
        for step in range(len(context)):
            assert torch.equal(context[step], regions.rank_BN[image] < step + 1)
            assert torch.equal(target[step], regions.rank_BN[image] == step + 1)
        if regions.count_B[image] > 1:
            assert len(context) == regions.count_B[image] - 1


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.6, 1.0])
def test_lambda_is_the_share_of_images_that_use_their_regions(progress: float):
    metrics = drawn(progress).metrics
    assert metrics["lambda"].item() == pytest.approx(progress)
    usable = 1 - metrics["empty_share"].item()
    assert metrics["ranked_share"].item() == pytest.approx(progress * usable, abs=0.08)


def test_curriculum_endpoints_can_be_moved():
    assert drawn(0.0, "method.curriculum.start=1.0").metrics["ranked_share"] == 1
    assert drawn(1.0, "method.curriculum.end=0.0").metrics["ranked_share"] == 0


def test_the_unit_batch_draws_once_for_all_images():
    shares = [drawn(p / 97, "method.curriculum.unit=batch").metrics["ranked_share"].item()
              for p in range(97)]  # fmt: skip
    assert set(shares) == {0.0, 1.0}
    assert sum(shares[:20]) < 10 < sum(shares[-20:])


def test_the_unit_region_keeps_all_regions_at_one_and_none_at_zero():
    kept = drawn(1.0, "method.curriculum.unit=region").plan
    assert torch.equal(kept.target_SN, drawn(1.0).plan.target_SN)
    plan = drawn(0.0, "method.curriculum.unit=region").plan
    first = plan.step_S == 1
    side = plan.context_SN[first].view(-1, *GRID)
    area = side.sum(dim=(1, 2))
    solid = side.any(dim=2).sum(dim=1) * side.any(dim=1).sum(dim=1)
    assert torch.equal(area, solid), "the first region is a solid rectangle"
    share = area / 64
    assert 0.12 < share.min() <= share.max() < 0.24
    assert not (plan.context_SN & plan.target_SN).any()
    assert (plan.step_S > 1).any(), "prediction stays sequential"


def test_an_image_without_regions_takes_the_blocks_and_is_counted():
    config = tiny_config("dseq_vitt8_64", "data.image_size=64", *PAPER)
    flat = torch.zeros(3, 64)
    flat[1] = SMOOTH[1]
    draw = build_method(config).draw(Look(torch.zeros(3, 64, 32), flat), GRID, 1.0, KEYS[:3])
    assert draw.metrics["empty_share"].item() == pytest.approx(2 / 3)
    blocks = sample_blocks(KEYS[:3], GRID)
    for image in (0, 2):
        assert torch.equal(steps_of(draw.plan, image)[1], blocks.target_BMN[image])


def test_random_regions_flat_is_ijepa_and_sequential_grows():
    """Table 4: regions {random, ranked} x prediction {flat, sequential}."""
    source = "method.regions.source=random"
    ijepa = drawn(1.0, preset="ijepa_vitt8_64").plan
    flat = drawn(1.0, source, "method.prediction=flat").plan
    assert torch.equal(flat.target_SN, ijepa.target_SN)
    assert torch.equal(flat.context_SN, ijepa.context_SN)
    sequential = drawn(1.0, source).plan
    for image in range(50):
        context, target = steps_of(sequential, image)
        for step in range(1, len(context)):
            assert torch.equal(context[step], context[step - 1] | target[step - 1])


def test_content_is_encoded_only_where_clusters_are_cut():
    def look(*overrides: str):  # type: ignore[no-untyped-def]
        method = build_method(
            tiny_config("dseq_vitt8_64", "method.saliency.kind=grad_cam", *overrides)
        )
        return method.look(float_images(2))

    def content(*overrides: str):  # type: ignore[no-untyped-def]
        return look(*overrides).content_BND

    assert content() is not None
    assert content("method.regions.source=random") is None
    assert look("method.regions.source=random").saliency_BN is None  # nothing would read it
    assert content("method.regions.kind=bands") is None


@pytest.mark.parametrize("order", ["inverse", "random", "spatial"])
def test_orders_permute_the_regions_and_change_nothing_else(order: str):
    plain, other = drawn(1.0), drawn(1.0, f"method.order={order}")
    assert len(plain.plan) == len(other.plan)
    changed = 0
    for image in range(60):
        sets = []
        for plan in (plain.plan, other.plan):
            context, target = steps_of(plan, image)
            parts = [context[:1], target] if len(context) else [target]
            sets.append({tuple(row.tolist()) for row in torch.cat(parts)})
            changed += 1 if plan is other.plan and len(context) else 0
        assert sets[0] == sets[1]
    assert changed
    assert not torch.equal(plain.plan.context_SN, other.plan.context_SN)


def test_max_steps_and_the_number_of_regions_bound_the_plan():
    assert drawn(1.0, "method.max_steps=2").plan.step_S.max() <= 4  # images without regions
    few = drawn(1.0, "method.regions.count=3", "method.curriculum.start=1.0")
    ranked = few.plan.step_S[: len(few.plan)]
    regions = rank_regions(SMOOTH, GRID, 3, 0.05)
    assert len(few.plan) == (regions.count_B - 1).sum() + 4 * (regions.count_B == 1).sum()
    assert ranked.max() <= 4


def test_a_plan_belongs_to_the_key_not_to_the_batch():
    for preset in ("dseq_vitt8_64", "ijepa_vitt8_64"):
        whole = drawn(0.5, preset=preset).plan
        part = drawn(0.5, preset=preset, keys=KEYS[:7]).plan
        count = len(part)
        assert torch.equal(whole.context_SN[:count], part.context_SN)
        assert torch.equal(whole.target_SN[:count], part.target_SN)


@pytest.mark.parametrize("weighting", ["token", "region"])
@pytest.mark.parametrize("preset", ["dseq_vitt8_64", "ijepa_vitt8_64"])
def test_the_loss_is_the_mean_over_patches_or_over_regions(preset: str, weighting: str):
    """Equation 7, from the public plan and predictions alone."""
    config = tiny_config(preset, f"method.loss_weighting={weighting}", "method.regularizer=none")
    method = dj.build_method(config)
    images, keys = float_images(6), torch.arange(6)
    step = method(images, progress=0.5, keys_B=keys)
    plan = method.plan(images, progress=0.5, keys_B=keys)
    prediction = method.predict(images, plan)
    targets = target_features(method.target(images).patches_BND)
    by_step = []
    for row in range(len(plan)):
        mine = prediction.row_T == row
        wanted = targets[plan.image_S[row], prediction.patch_T[mine]]
        by_step.append(F.smooth_l1_loss(prediction.values_TD[mine], wanted, reduction="none"))
    if weighting == "token":
        expected = torch.cat(by_step).mean()
    else:
        expected = torch.stack([values.mean() for values in by_step]).mean()
    torch.testing.assert_close(step.loss, expected)
    rows = torch.cat(by_step) if weighting == "token" else by_step
    assert step.weight == len(rows)
    for number in range(4):
        values = [v.mean() for v, k in zip(by_step, plan.step_S, strict=True) if k == number + 1]
        if values:
            torch.testing.assert_close(
                step.metrics["loss_by_step"][number], torch.stack(values).mean()
            )


@pytest.mark.parametrize("preset", ["dseq_vitt8_64", "ijepa_vitt8_64", "cjepa_vitt8_64"])
def test_a_step_trains_everything_but_the_target(preset: str):
    overrides = ["method.vicreg.projector_width=16"] if preset.startswith("cjepa") else []
    method = dj.build_method(tiny_config(preset, *overrides))
    step = method(float_images(8), progress=0.5, keys_B=torch.arange(8))
    step.loss.backward()
    for name, parameter in method.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient != name.startswith("target."), name
    assert not step.pooled_BD.requires_grad


def test_a_method_is_a_function_of_its_seed():
    a, b = (build_method(tiny_config()).state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    other = build_method(tiny_config("dseq_vitt8_64", "runtime.seed=1")).state_dict()
    assert not torch.equal(a["encoder.cls_token"], other["encoder.cls_token"])


def test_target_and_context_encoder_start_equal():
    method = build_method(tiny_config())
    for key, value in method.encoder.state_dict().items():
        assert torch.equal(value, method.target.state_dict()[key])


@pytest.mark.parametrize("preset", ["dseq_vitt8_64", "ijepa_vitt8_64"])
def test_constant_images_give_a_finite_loss(preset: str):
    method = build_method(tiny_config(preset))
    step = method(torch.zeros(4, 3, 32, 32), progress=1.0, keys_B=torch.arange(4))
    assert step.loss.isfinite()
    step.loss.backward()


def test_non_square_images_train():
    config = tiny_config("dseq_vitt8_64", "data.image_size=[32,64]")
    step = build_method(config)(float_images(4, (32, 64)), progress=0.5, keys_B=torch.arange(4))
    assert step.loss.isfinite()


def loss_of(*overrides: str, preset: str = "dseq_vitt8_64", progress: float = 0.5):  # type: ignore[no-untyped-def]
    method = dj.build_method(tiny_config(preset, *overrides))
    return method, method(float_images(6), progress=progress, keys_B=torch.arange(6))


def test_the_weight_of_prediction_scales_it_and_at_zero_leaves_the_regulariser_alone():
    term = ("method.regularizer=vicreg", "method.regularizer_weight=0.1")
    _, full = loss_of(*term)
    method, alone = loss_of(*term, "method.prediction_weight=0")
    torch.testing.assert_close(alone.loss, 0.1 * alone.metrics["regularizer"])
    torch.testing.assert_close(full.loss - alone.loss, full.metrics["prediction_loss"])
    assert alone.metrics["prediction_loss"] > 0, "it is measured all the same"
    alone.loss.backward()
    assert all(p.grad is None for p in method.predictor.parameters())
    nearly, step = loss_of(*term, "method.prediction_weight=1e-30")
    step.loss.backward()
    for parameter, other in zip(
        method.encoder.parameters(), nearly.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, other.grad)
    assert method.encoder.patch_embed.proj.weight.grad.any()


@pytest.mark.parametrize("regularizer", ["vicreg", "sigreg"])
@pytest.mark.parametrize("over", ["pooled", "patches"])
def test_every_regulariser_teaches_the_context_encoder(regularizer: str, over: str):
    method, step = loss_of(
        f"method.regularizer={regularizer}",
        f"method.regularizer_over={over}",
        "method.prediction_weight=0",
    )
    step.loss.backward()
    assert step.metrics["regularizer"] > 0
    assert method.encoder.blocks[0].mlp.fc1.weight.grad.any()


def test_centred_targets_depend_on_the_image_alone():
    """Images that are all alike leave nothing to predict."""
    method = dj.build_method(tiny_config("ijepa_vitt8_64", "target.centring=place"))
    features_BND = torch.randn(5, 16, 32) + 7 * torch.randn(16, 32)
    targets_BND = method._targets(features_BND)
    expected_BND = target_features(features_BND - features_BND.mean(dim=0))
    torch.testing.assert_close(targets_BND, expected_BND)
    assert not method._targets(features_BND[:1].expand(3, -1, -1)).abs().gt(0.1).any()


def test_targets_of_several_blocks_are_their_mean():
    method = dj.build_method(tiny_config("ijepa_vitt8_64", "target.blocks=2"))
    images = float_images(3)
    expected_BND = torch.stack(method.target(images).layers).mean(dim=0)
    torch.testing.assert_close(method.look(images).patches_BND, expected_BND)
    dseq = dj.build_method(tiny_config("dseq_vitt8_64", "target.blocks=2"))
    torch.testing.assert_close(dseq.look(images).patches_BND, expected_BND)


def test_scattered_masks_are_one_step_that_predicts_their_share():
    plan = drawn(0.0, "method.blocks.kind=scattered", preset="ijepa_vitt8_64").plan
    assert len(plan) == len(KEYS)
    assert (plan.target_SN.sum(dim=1) == 48).all()
    assert torch.equal(plan.context_SN, ~plan.target_SN)
    assert plan.target_SN.float().mean(dim=0).sub(0.75).abs().max() < 0.1
    quarter = drawn(
        0.0, "method.blocks.kind=scattered", "method.blocks.mask_ratio=0.25",
        preset="ijepa_vitt8_64",
    ).plan  # fmt: skip
    assert (quarter.target_SN.sum(dim=1) == 16).all()


def test_clusters_of_content_give_every_image_its_sequence():
    config = tiny_config(
        "dseq_vitt8_64",
        "data.image_size=64",
        "method.saliency.kind=rarity",
        "method.regions.kind=clusters",
        "method.regions.min_area=0",
        "model.class_token=false",
    )
    method, images, keys = build_method(config), float_images(12, (64, 64)), torch.arange(12)
    draw = method.draw_at_end(method.look(images), GRID, keys)
    assert draw.metrics["regions"] == 5
    assert draw.metrics["empty_share"] == 0
    assert len(draw.plan) == 4 * 12
    step = method(images, progress=1.0, keys_B=keys)
    assert step.metrics["steps_per_image"] == 4
    sight = method.look(images)
    expected = rank_regions(
        sight.saliency_BN, GRID, 5, 0.0, kind="clusters", features_BND=sight.content_BND
    )
    for image in range(12):
        context, target = steps_of(draw.plan, image)
        for k in range(4):
            assert torch.equal(context[k], expected.rank_BN[image] <= k)
            assert torch.equal(target[k], expected.rank_BN[image] == k + 1)


def test_a_blank_image_has_no_content_and_takes_the_blocks():
    config = tiny_config(
        "dseq_vitt8_64", "method.saliency.kind=rarity", "method.regions.kind=clusters"
    )
    step = build_method(config)(torch.zeros(4, 3, 32, 32), progress=1.0, keys_B=torch.arange(4))
    assert step.metrics["empty_share"] == 1
    assert step.loss.isfinite()


@pytest.mark.parametrize("views", ["shared", "apart"])
def test_photometric_changes_reach_both_encoders_and_the_plan_stays(views: str):
    method = dj.build_method(
        tiny_config("ijepa_vitt8_64", "data.photometric=0.5", f"data.photometric_views={views}")
    )
    images, keys = float_images(4), torch.arange(4)
    context, sight = method._views(images, keys)
    assert not torch.equal(context, images)
    seen = method.look(context).patches_BND
    assert torch.equal(seen, sight.patches_BND) == (views == "shared")
    part = method._views(images[1:3], keys[1:3])[1]
    torch.testing.assert_close(part.patches_BND, sight.patches_BND[1:3])
    assert method(images, progress=0.0, keys_B=keys).loss.isfinite()


@pytest.mark.parametrize("preset", ["ijepa_vitt8_64", "dseq_vitt8_64"])
def test_targets_of_a_context_window_are_features_at_its_places(preset: str):
    method = dj.build_method(tiny_config(preset, "data.context_window=0.2"))
    images, keys = float_images(6), torch.arange(6)
    grid, whole = method.target.grid_of(images), method.look(images)
    context, sight = method._views(images, keys)
    window_B23 = draw_windows(keys, 0.2)
    assert torch.equal(context, sample_windows(images, window_B23))
    for found, features in (
        (sight.patches_BND, whole.patches_BND),
        (sight.content_BND, whole.content_BND),
    ):
        if features is not None:
            assert torch.equal(found, sample_tokens(features, grid, window_B23))
    assert (sight.saliency_BN is None) == (whole.saliency_BN is None)
    assert not torch.allclose(sight.patches_BND, method.look(context).patches_BND)
    assert method(images, progress=1.0, keys_B=keys).loss.isfinite()
