"""Rehearsed steps are the run's own, and their reported cost is correct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dseqjepa.errors import InputError
from dseqjepa.methods import build_method
from dseqjepa.model.flops import step_flops
from dseqjepa.train import pretrain as module
from dseqjepa.train import rehearsal
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.pretrain import fitting
from dseqjepa.train.rehearsal import activations, peak, rehearse, reset_peak, resident, state_bytes
from tests.children import ends, start
from tests.train.tiny_runs import BATCH, IMAGES, STEPS, Pictures, metrics, run_config, train


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "STEPS", 2)
    monkeypatch.setattr(rehearsal, "PLAN_IMAGES", IMAGES)


@pytest.mark.parametrize("method", ["dseq", "ijepa"])
def test_tokens_are_those_that_a_run_counts(method: str, tmp_path: Path) -> None:
    """A run that hardly learns logs, over its first and its last epoch, what was foretold."""
    settings = ["log.every_steps=5", "optim.lr=1e-12", "optim.start_lr=0", "optim.final_lr=0"]
    config = run_config(method, *settings)
    out = train(config, tmp_path / "run")
    found = rehearse(fitting(config, Pictures()), Pictures(), open_checkpoint(out))
    assert found.batch == found.measured_batch == BATCH
    assert found.steps == STEPS
    first, last = metrics(out)[1], metrics(out)[-1]
    assert (first["step"], last["step"]) == (5, STEPS)
    for pace, seen in ((found.start, first), (found.end, last)):
        assert pace.tokens.images == IMAGES
        for key, value in (
            ("encoder_tokens", pace.tokens.encoder),
            ("predicted_tokens", pace.tokens.predicted),
        ):
            assert value / IMAGES == pytest.approx(seen[key] / BATCH, rel=0.15)
    model = build_method(config)
    for pace in (found.start, found.end):
        flops = step_flops(model.encoder, model.predictor, pace.tokens)
        assert pace.flops == flops / IMAGES
        assert pace.images_per_s > 0
        assert 0 <= pace.waiting < 1
    low, high = sorted((found.start.images_per_s, found.end.images_per_s))
    assert low <= found.images_per_s <= high
    assert found.loader_images_per_s > 0
    assert found.other_precision is not None
    assert found.cache == 0  # the pictures are in memory


def test_a_rehearsal_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Pictures(bad=(3,))
    config = fitting(run_config("dseq"), source)
    rehearse(config, source)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_would_not_fit_is_measured_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "FIRST_BATCH", 2)
    source = Pictures()
    config = fitting(run_config("ijepa"), source)
    assert rehearse(config, source).measured_batch == BATCH
    monkeypatch.setattr(rehearsal, "available_memory", lambda: 0)
    found = rehearse(config, source)
    assert (found.batch, found.measured_batch) == (BATCH, 2)
    monkeypatch.undo()
    monkeypatch.setattr(rehearsal, "FIRST_BATCH", 2)
    monkeypatch.setattr(rehearsal, "LONGEST_STEP", 0.0)
    assert rehearse(config, source).measured_batch == 2


@pytest.mark.parametrize("method", ["dseq", "ijepa"])
def test_a_large_encoder_is_measured_with_few_of_its_blocks(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state, tokens and FLOPs are its own; its pace is the measured one times the share of
    FLOPs that was measured."""
    own = ["method.saliency.block=6", "method.regions.features=5"] if method == "dseq" else []
    source = Pictures()
    config = fitting(run_config(method, "model.depth=8", "target.blocks=6", *own), source)
    measured = {"images_per_s": 100.0, "waiting": 0.25}
    monkeypatch.setattr(rehearsal._Stage, "time", lambda *_: tuple(measured.values()))
    whole = build_method(config)
    assert rehearse(config, source).measured_depth == 8
    monkeypatch.setattr(rehearsal, "LARGE", sum(p.numel() for p in whole.encoder.parameters()))
    found = rehearse(config, source)
    assert found.measured_depth == rehearsal.SHALLOW < 8
    assert found.state == state_bytes(whole)
    kept = max(activations(whole, pace.tokens, "fp32") for pace in (found.start, found.end))
    assert found.memory == found.state + round(BATCH * kept)
    shallow = build_method(rehearsal._shallow(config))
    for pace in (found.start, found.end):
        flops, here = (
            step_flops(model.encoder, model.predictor, pace.tokens) / pace.tokens.images
            for model in (whole, shallow)
        )
        assert pace.flops == flops
        computing = 0.0075 * flops / here
        assert pace.images_per_s == pytest.approx(1 / max(computing, 0.01))
        assert pace.waiting == pytest.approx(1 - computing * pace.images_per_s)
    monkeypatch.setattr(rehearsal, "LARGE", rehearsal.LARGE + 1)
    assert rehearse(config, source).measured_depth == 8


def test_what_a_device_sees_at_a_time_is_its_part_of_the_batch() -> None:
    source = Pictures()
    config = fitting(run_config("ijepa", "optim.accumulate=4"), source)
    assert rehearse(config, source).batch == BATCH // 4


def test_the_state_is_weights_gradients_moments_and_the_target() -> None:
    source = Pictures()
    config = fitting(run_config("ijepa"), source)
    method = build_method(config)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    target = sum(p.numel() for p in method.target.parameters())
    assert rehearse(config, source).state == 4 * (4 * trained + target)


def peak_of_a_block() -> None:
    """In a child, where nothing that was freed before lies about to be used again."""
    reset_peak()
    before = resident()
    block = torch.ones(60_000_000, dtype=torch.uint8)
    del block
    assert peak() - before > 50_000_000
    reset_peak()
    assert peak() - before < 50_000_000


def test_the_peak_is_the_most_that_was_in_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ends([start(peak_of_a_block, log=log)], 240) == [0], log.read_text()


def test_a_model_is_refused_by_what_it_needs_and_not_by_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, config = Pictures(), run_config("ijepa")
    needed = state_bytes(build_method(config))
    for there, is_refused in ((needed - 1, True), (needed, False), (0, False)):
        monkeypatch.setattr(module, "available_memory", lambda there=there: there)
        if is_refused:
            with pytest.raises(
                InputError, match=r"the model needs .* GB are available: lower model"
            ):
                fitting(config, source)
        else:
            assert fitting(config, source).model == config.model
