"""A trace holds the method's plan, loss and regions as plain arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dseqjepa.config import CutConfig, RegionsConfig, SaliencyConfig
from dseqjepa.errors import InputError
from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.model.look import look_for_saliency, saliency
from dseqjepa.plans.regions import otsu_foreground, rank_regions
from dseqjepa.train.checkpoint import load_method
from dseqjepa.viz.trace import Trace, shared_cut, trace
from tests.tiny import PAPER, float_images, tiny_config
from tests.train.tiny_runs import run_config, train

KEYS = torch.arange(6) + 40
AT_ONCE = ("method.curriculum.start=1.0", "method.curriculum.end=1.0")


def method_of(preset: str = "dseq_vitt8_64", *overrides: str) -> Method:
    """A method whose target and context encoder differ, as after training."""
    method = build_method(tiny_config(preset, *overrides)).eval().requires_grad_(False)
    for index, parameter in enumerate(method.encoder.parameters()):
        torch.manual_seed(index)
        parameter.add_(0.05 * torch.randn_like(parameter))
    return method


def total_loss(traces: list[Trace]) -> float:
    """The mean over all predicted patches of a batch."""
    losses = [step.loss_hw[step.target_hw] for item in traces for step in item.steps]
    return float(np.concatenate(losses).mean())


@pytest.mark.parametrize("preset", ["dseq_vitt8_64", "ijepa_vitt8_64", "cjepa_vitt8_64"])
@pytest.mark.parametrize("context", ["prefix", "causal", "independent"])
def test_the_loss_is_the_methods_own_on_the_same_plan(preset: str, context: str):
    own = [*AT_ONCE, f"method.context={context}"] if preset.startswith("dseq") else []
    method = method_of(preset, *own)
    images = float_images(6)
    traces = trace(method, images, KEYS)
    step = method(images, progress=1.0, keys_B=KEYS)
    assert total_loss(traces) == pytest.approx(float(step.metrics["prediction_loss"]), rel=1e-5)
    plan = method.plan(images, progress=1.0, keys_B=KEYS)
    assert [len(item.steps) for item in traces] == plan.image_S.bincount(minlength=6).tolist()


def test_the_context_of_step_k_is_what_ranks_below_k():
    traces = trace(method_of("dseq_vitt8_64", *AT_ONCE), float_images(6), KEYS)
    ranked = [item for item in traces if item.is_ranked]
    assert len(ranked) > 2
    for item in ranked:
        assert [step.number for step in item.steps] == list(range(1, item.count))
        assert set(np.unique(item.rank_hw)) == set(range(item.count))
        for step in item.steps:
            assert (step.context_hw == (item.rank_hw < step.number)).all()
            assert (step.target_hw == (item.rank_hw == step.number)).all()
            assert (np.isnan(step.loss_hw) == ~step.target_hw).all()
            assert step.loss == pytest.approx(np.nanmean(step.loss_hw), rel=1e-5)


@pytest.mark.parametrize("unit", ["image", "region", "batch"])
def test_the_curriculum_does_not_matter(unit: str):
    """A run that never leaves random blocks is still shown by its regions."""
    random = f"method.curriculum.unit={unit}", "method.curriculum.end=0.0"
    images = float_images(6)
    settled = trace(method_of("dseq_vitt8_64", *AT_ONCE), images, KEYS)
    early = trace(method_of("dseq_vitt8_64", *random), images, KEYS)
    for one, other in zip(settled, early, strict=True):
        assert (one.rank_hw == other.rank_hw).all()
        assert [s.loss for s in one.steps] == [s.loss for s in other.steps]


def test_saliency_foreground_and_regions_are_those_of_the_target():
    method, images = method_of("dseq_vitt8_64", *PAPER), float_images(6)
    traces = trace(method, images, KEYS)
    saliency_BN = saliency(method.target, images)
    regions = rank_regions(saliency_BN, (4, 4), 5, 0.05)
    for index, item in enumerate(traces):
        assert item.saliency_kind == "cls_similarity"
        assert torch.equal(torch.tensor(item.saliency_hw).flatten(), saliency_BN[index])
        assert torch.equal(torch.tensor(item.rank_hw).flatten(), regions.rank_BN[index])
        assert item.count == int(regions.count_B[index])
        # Every region but the left-over is cut from the foreground.
        assert item.foreground_hw[item.rank_hw < item.count - 1].all()
    assert torch.equal(
        otsu_foreground(saliency_BN),
        torch.tensor(np.stack([item.foreground_hw.ravel() for item in traces])),
    )


def test_a_map_without_a_region_takes_random_blocks():
    flat = torch.zeros(1, 3, 32, 32)
    method = method_of("dseq_vitt8_64", *PAPER)
    method.target.pos_embed.zero_()
    (item,) = trace(method, flat, KEYS[:1])
    assert item.count == 1
    assert not item.is_ranked
    assert len(item.steps) >= 1
    assert not item.foreground_hw.any()


def test_i_jepa_has_its_blocks_and_the_regions_of_its_saliency():
    method, images = method_of("ijepa_vitt8_64"), float_images(6)
    cut = CutConfig(saliency=SaliencyConfig(), regions=RegionsConfig(count=3, min_area=0.05))
    traces = trace(method, images, KEYS, cut=cut)
    expected = rank_regions(saliency(method.target, images), (4, 4), 3, 0.05)
    for index, item in enumerate(traces):
        assert not item.is_ranked
        assert torch.equal(torch.tensor(item.rank_hw).flatten(), expected.rank_BN[index])
        contexts = {step.context_hw.tobytes() for step in item.steps}
        assert len(contexts) == 1  # one context, several targets


def test_without_regions_of_its_own_a_method_is_shown_by_rarity_and_clusters():
    method, images = method_of("ijepa_vitt8_64", "model.class_token=false"), float_images(3)
    sight = look_for_saliency(method.target, images, kind="rarity", content="target")
    expected = rank_regions(
        sight.saliency_BN, (4, 4), 5, 0.02, kind="clusters", features_BND=sight.content_BND
    )
    for index, item in enumerate(trace(method, images, KEYS[:3])):
        assert item.saliency_kind == "rarity"
        assert torch.equal(torch.tensor(item.rank_hw).flatten(), expected.rank_BN[index])
    own = method_of("dseq_vitt8_64", "model.class_token=false", "method.saliency.kind=grad_cam")
    (item,) = trace(own, float_images(1), KEYS[:1])
    assert item.saliency_kind == "grad_cam"


def test_an_image_alone_is_traced_as_in_a_batch_and_grids_need_not_be_square():
    method, images = (
        method_of("dseq_vitt8_64", "data.image_size=[32,48]"),
        float_images(3, (32, 48)),
    )
    together = trace(method, images, KEYS[:3])
    for index, item in enumerate(together):
        (alone,) = trace(method, images[index : index + 1], KEYS[index : index + 1])
        assert item.rank_hw.shape == (4, 6)
        assert (alone.rank_hw == item.rank_hw).all()
        np.testing.assert_allclose(
            [s.loss for s in alone.steps], [s.loss for s in item.steps], rtol=1e-4
        )


def test_random_regions_may_miss_a_patch():
    method = method_of("dseq_vitt8_64", "method.regions.source=random")
    for item in trace(method, float_images(6), KEYS):
        for step in item.steps:
            assert (step.target_hw == (item.rank_hw == step.number)).all()


def test_a_diverged_encoder_is_an_input_error():
    method = method_of()
    method.target.cls_token.fill_(torch.nan)
    with pytest.raises(InputError, match="finite"):
        trace(method, float_images(2), KEYS[:2])


@pytest.mark.parametrize("name", ["dseq", "ijepa", "cjepa"])
def test_a_method_is_loaded_whole(name: str, tmp_path: Path):
    """All that a run trained comes back: its predictor predicts what the run's did."""
    config = run_config(name, "optim.epochs=1", "optim.lr=0.01")
    out = train(config, tmp_path / "run")
    loaded = load_method(out)
    untrained = build_method(config)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    same = {
        key: torch.equal(value, untrained.state_dict()[key])
        for key, value in loaded.state_dict().items()
        if "weight" in key and value.ndim == 2
    }
    assert not any(same.values())
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_method(tmp_path)


def test_all_maps_of_a_comparison_are_cut_as_by_the_first_method_that_has_regions():
    ijepa, dseq = (tiny_config(f"{name}_vitt8_64").method for name in ("ijepa", "dseq"))
    other = tiny_config("dseq_vitt8_64", *PAPER).method
    assert shared_cut([ijepa, dseq, other]) == dseq.cut
    assert shared_cut([ijepa, other]) == other.cut
    assert shared_cut([ijepa]) == CutConfig()
