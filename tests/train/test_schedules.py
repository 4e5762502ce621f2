"""The schedules follow the paper's recipe and depend only on the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from dseqjepa.config import EmaConfig, OptimConfig
from dseqjepa.train.schedules import Schedule

START, PEAK, FINAL = 1e-4, 1e-3, 1e-6


def schedule(epochs: int = 10, warmup: float = 2.0, steps_per_epoch: int = 50) -> Schedule:
    optim = OptimConfig(
        epochs=epochs,
        warmup_epochs=warmup,
        lr=PEAK,
        start_lr=START,
        final_lr=FINAL,
        weight_decay=0.04,
        final_weight_decay=0.4,
    )
    return Schedule(optim, EmaConfig(start=0.996, end=1.0), steps_per_epoch)


def test_the_learning_rate_at_its_corners() -> None:
    s = schedule()
    assert (s.steps, s.warmup_steps) == (500, 100)
    assert s.lr(0) == START
    assert s.lr(50) == pytest.approx((START + PEAK) / 2)
    assert s.lr(100) == PEAK
    assert s.lr(300) == pytest.approx((PEAK + FINAL) / 2)
    assert s.lr(200) == pytest.approx(FINAL + (PEAK - FINAL) * (1 + math.sqrt(0.5)) / 2)
    assert s.lr(500) == pytest.approx(FINAL)


def test_the_learning_rate_rises_then_falls() -> None:
    s = schedule()
    rates = [s.lr(step) for step in range(s.steps + 1)]
    rises = [after > before for before, after in pairwise(rates)]
    assert rises == [True] * 100 + [False] * 400
    assert len(set(rates)) == len(rates)


def test_without_warm_up_the_learning_rate_starts_at_its_peak() -> None:
    s = schedule(warmup=0)
    assert s.warmup_steps == 0
    assert s.lr(0) == PEAK
    assert s.lr(250) == pytest.approx((PEAK + FINAL) / 2)


def test_warm_up_over_all_epochs_only_rises() -> None:
    s = schedule(epochs=2, warmup=2)
    assert s.warmup_steps == s.steps == 100
    for step in range(100):
        assert s.lr(step) == pytest.approx(START + (PEAK - START) * step / 100)
    assert s.lr(100) == PEAK


def test_warm_up_may_be_a_part_of_an_epoch() -> None:
    assert schedule(warmup=0.5).warmup_steps == 25


def test_a_single_step_has_every_value() -> None:
    s = schedule(epochs=1, warmup=0, steps_per_epoch=1)
    assert (s.lr(0), s.momentum(0)) == (PEAK, 0.996)
    assert s.weight_decay(0) == pytest.approx(0.04)


def test_weight_decay_goes_along_a_cosine_from_start_to_end() -> None:
    s = schedule()
    assert s.weight_decay(0) == pytest.approx(0.04)
    assert s.weight_decay(125) == pytest.approx(0.04 + 0.36 * (1 - math.sqrt(0.5)) / 2)
    assert s.weight_decay(250) == pytest.approx(0.22)
    assert s.weight_decay(500) == pytest.approx(0.4)
    decays = [s.weight_decay(step) for step in range(501)]
    assert decays == sorted(decays)


def test_momentum_and_progress_are_linear_over_all_steps() -> None:
    s = schedule()
    for step in (0, 1, 100, 250, 499, 500):
        assert s.progress(step) == pytest.approx(step / 500)
        assert s.momentum(step) == pytest.approx(0.996 + 0.004 * step / 500)
    assert s.momentum(500) == 1.0


def test_values_depend_on_the_share_of_training_and_not_on_its_length() -> None:
    short, long = schedule(steps_per_epoch=10), schedule(steps_per_epoch=1000)
    for step in range(short.steps + 1):
        for name in ("lr", "weight_decay", "momentum", "progress"):
            there = getattr(long, name)(100 * step)
            assert getattr(short, name)(step) == pytest.approx(there)
