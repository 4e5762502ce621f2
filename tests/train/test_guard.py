"""A non-finite step or a spike leaves no trace in parameters and optimizer state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dseqjepa.config import GuardConfig
from dseqjepa.errors import RunError, Stopped
from dseqjepa.methods import ordered as dseq_module
from dseqjepa.methods.base import Method, Step
from dseqjepa.model.look import Look, look_for_saliency
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.guard import Guard, Level
from dseqjepa.train.loop import Trainer
from tests.train.test_resume import at_batch, terminate
from tests.train.tiny_runs import (
    BATCH,
    STEPS,
    Pictures,
    assert_same_run,
    metrics,
    run_config,
    tensors,
    train,
)

EVERY_STEP = ["checkpoint.every_steps=1", "checkpoint.keep=99", "log.every_steps=1"]
GENERATOR = np.random.default_rng(0)


# The limit


def test_the_limit_is_six_deviations_above_the_mean_of_the_last_128() -> None:
    level = Level(window=128, sigma=6.0)
    values = GENERATOR.normal(5, 1, 300).tolist()
    for count, value in enumerate(values):
        if count < 128:
            assert level.limit == math.inf
        else:
            last = np.array(values[count - 128 : count])
            assert level.limit == pytest.approx(last.mean() + 6 * last.std())
        assert level.take(value) == ""


def test_a_value_just_above_the_limit_is_a_jump_and_one_just_below_is_none() -> None:
    for factor, jumps in ((1 - 1e-9, False), (1 + 1e-9, True)):
        level = Level(4, 6.0, [1.0, 2.0, 3.0, 4.0])
        assert bool(level.take(level.limit * factor)) == jumps


def test_an_outlier_hardly_moves_the_limit() -> None:
    level = Level(128, 6.0, GENERATOR.normal(5, 1, 128).tolist())
    before = level.limit
    assert level.take(1e9)
    assert before < level.limit < 1.2 * before


@pytest.mark.parametrize("factor", [2.0, 10.0])
def test_a_new_level_is_accepted_after_some_steps(factor: float) -> None:
    level = Level(128, 6.0, GENERATOR.normal(5, 0.5, 128).tolist())
    jumps = [bool(level.take(value)) for value in GENERATOR.normal(5 * factor, 0.5, 128).tolist()]
    assert jumps[0]
    assert not any(jumps[32:])


def test_sigma_0_never_calls_anything_a_jump() -> None:
    level = Level(2, 0.0, [1.0, 1.0])
    assert level.take(1e30) == ""


def test_what_is_not_finite_does_not_enter_the_window() -> None:
    guard = Guard(GuardConfig(window=4))
    for bad in (math.nan, math.inf, -math.inf):
        assert guard.judge(bad, 1.0) == f"the loss is {bad}"
        assert guard.judge(1.0, bad) == f"the gradient norm is {bad}"
    assert (guard.skipped, guard.in_a_row) == (6, 6)
    assert guard.to_json()["losses"] == guard.to_json()["norms"] == []
    assert guard.judge(1.0, 1.0) == ""
    assert (guard.skipped, guard.in_a_row) == (6, 0)


def test_a_guard_resumes_from_its_json_as_if_it_had_never_stopped() -> None:
    config = GuardConfig(window=16)
    pairs = GENERATOR.lognormal(0, 1, (200, 2)).tolist()
    pairs[50][1] = pairs[51][0] = math.nan
    whole, cut = Guard(config), Guard(config)
    for loss, norm in pairs:
        cut = Guard(config, json.loads(json.dumps(cut.to_json())))
        assert whole.judge(loss, norm) == cut.judge(loss, norm)
    assert whole.to_json() == cut.to_json()
    assert whole.skipped > 2


# In a run


def at_steps(patch: pytest.MonkeyPatch, fault: Callable[[], Any], steps: set[int]) -> None:
    """The fault is on in the steps of these numbers, from 1, and in no other."""
    original = Trainer._train_step

    def train_step(trainer: Trainer, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            if trainer.step + 1 in steps:
                inner.setattr(*fault())
            original(trainer, *arguments)

    patch.setattr(Trainer, "_train_step", train_step)


def changed_loss(change: Callable[[Tensor, Method], Tensor]) -> Callable[[], Any]:
    forward = Method.forward

    def broken(method: Method, *arguments: Any, **more: Any) -> Step:
        step = forward(method, *arguments, **more)
        return step._replace(loss=change(step.loss, method))

    return lambda: (Method, "forward", broken)


def broken_saliency() -> Any:
    def look(*arguments: Any, **more: Any) -> Look:
        seen = look_for_saliency(*arguments, **more)
        assert seen.saliency_BN is not None
        seen.saliency_BN[1, 3] = math.nan
        return seen

    return dseq_module, "look_for_saliency", look


def bad_gradient(loss: Tensor, method: Method) -> Tensor:
    """The loss keeps its value, and one gradient becomes 0 / 0."""
    return (
        loss + (method.encoder.norm.bias[0].detach() * 0 + 0 * method.encoder.norm.bias[0]).sqrt()
    )


FAULTS = {
    "nan loss": (changed_loss(lambda loss, _: loss * math.nan), "the loss is nan"),
    "inf loss": (changed_loss(lambda loss, _: loss + math.inf), "the loss is inf"),
    "gradient": (changed_loss(bad_gradient), "the gradient norm is nan"),
    "huge gradient": (changed_loss(lambda loss, _: loss * 1e38), "the gradient norm is "),
    "saliency": (broken_saliency, "the loss is nan"),
}


def assert_untouched(out: Path, step: int) -> None:
    """The state after a step is the state before it, bit for bit."""
    folder = out / "checkpoints"
    before, after = (tensors(folder / f"step-{n:08d}") for n in (step - 1, step))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def skipped(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, accumulate: int
) -> None:
    make, reason = FAULTS[fault]
    at_steps(monkeypatch, make, {1, 7})
    seen: list[list[str]] = []
    original = Trainer._next

    def spy(trainer: Trainer, *arguments: Any) -> Any:
        batch = original(trainer, *arguments)
        if trainer.step + 1 == 7:
            seen.append([trainer.source.name(index) for index in batch.index_B.tolist()])
        return batch

    monkeypatch.setattr(Trainer, "_next", spy)
    config = run_config("dseq", *EVERY_STEP, f"optim.accumulate={accumulate}", "optim.epochs=2")
    out = train(config, tmp_path / "run")
    lines = skipped(out)
    assert [line["step"] for line in lines] == [1, 7]
    assert all(reason in line["reason"] for line in lines)
    assert lines[1]["images"] == [name for names in seen for name in names]
    assert len(lines[1]["images"]) == BATCH
    for step in (1, 7):
        assert_untouched(out, step)
    with pytest.raises(AssertionError):
        assert_untouched(out, 8)
    assert all(
        value.isfinite().all() for value in tensors(out).values() if value.is_floating_point()
    )
    told = metrics(out)
    assert [line["step"] for line in told] == [2, 3, 4, 5, 6, 8, 9, 10]
    assert [line["skipped"] for line in told] == [1, 1, 1, 1, 1, 2, 2, 2]
    assert all(math.isfinite(line["loss"]) for line in told)
    log = (out / "log.txt").read_text()
    assert f"steps skipped: 2, see {out}/skipped.jsonl" in log


def test_a_projector_remembers_nothing_of_a_step_that_was_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_steps(monkeypatch, FAULTS["nan loss"][0], {4})
    assert_untouched(train(run_config("cjepa", *EVERY_STEP), tmp_path / "run"), 4)


def test_steps_that_are_never_finite_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_steps(monkeypatch, FAULTS["nan loss"][0], {3, 4, *range(6, 21)})
    out = tmp_path / "run"
    with pytest.raises(RunError) as caught:
        train(run_config("ijepa", "guard.patience=3", "checkpoint.every_steps=1"), out)
    assert str(caught.value) == (
        "3 consecutive non-finite steps, the last at step 8: lower optim.lr, or check the "
        f"images listed in {out}/skipped.jsonl"
    )
    assert [line["step"] for line in skipped(out)] == [3, 4, 6, 7, 8]
    assert open_checkpoint(out).step == 7


@pytest.mark.parametrize("what", ["the loss", "the gradient norm"])
def test_a_spike_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def spike(loss: Tensor, method: Method) -> Tensor:
        # Either the value alone or the gradient alone.
        return loss + 50 if what == "the loss" else 50 * loss - 49 * loss.detach()

    at_steps(monkeypatch, changed_loss(spike), {5, 14})  # at 5 the window is not full
    settings = ["guard.window=8", "optim.lr=1e-5", "optim.start_lr=1e-5"]
    out = train(run_config("ijepa", *EVERY_STEP, *settings), tmp_path / "run")
    settled = [line for line in skipped(out) if line["step"] == 14]
    assert len(settled) == 1
    assert settled[0]["reason"].startswith(f"{what} ")
    assert_untouched(out, 14)
    assert metrics(out)[-1]["skipped"] == len(skipped(out))


def test_a_run_with_steps_left_out_resumes_as_if_it_had_not_been_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spike_or_nan(loss: Tensor, method: Method) -> Tensor:
        return loss * 50

    config = run_config("dseq", "guard.window=4", "checkpoint.every_steps=3")
    at_steps(monkeypatch, changed_loss(spike_or_nan), {7, 12, 13, 18})
    whole, out = train(config, tmp_path / "whole"), tmp_path / "run"
    cuts = 0
    while True:
        patch = at_batch(5, terminate)
        try:
            train(config, out, resume=cuts > 0)
        except Stopped:
            cuts += 1
        else:
            break
        finally:
            patch.undo()
    assert cuts >= 3
    assert_same_run(whole, out)
    assert (whole / "skipped.jsonl").read_text() == (out / "skipped.jsonl").read_text()
    assert open_checkpoint(out).state["guard"]["skipped"] >= 3
    assert len(open_checkpoint(out).state["guard"]["losses"]) == 4


def test_healthy_runs_take_every_step(tmp_path: Path) -> None:
    out = train(
        run_config("dseq", "guard.window=8", "optim.epochs=8"), tmp_path / "run", Pictures()
    )
    assert not (out / "skipped.jsonl").exists()
    assert metrics(out)[-1]["step"] == 2 * STEPS
