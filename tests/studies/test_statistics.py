"""Intervals and tests have their nominal coverage and error rates on data with a known effect."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from dseqjepa.studies.statistics import (
    LEVEL,
    POWER,
    compare,
    detectable,
    hedges,
    holm,
    least_p_signs,
)

STUDIES = 20_000
"""Simulated ones: the standard error of a share near 5 % is 0.15 %."""


def simulated(effect: float, seeds: int, studies: int = STUDIES, draw: int = 0) -> np.ndarray:
    """Differences of two variants that share a seed's luck, which is larger than their own."""
    generator = np.random.default_rng(draw)
    luck = 5 * generator.standard_normal((studies, seeds))
    one, other = generator.standard_normal((2, studies, seeds))
    return (luck + effect + one) - (luck + other)


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("effect", [0.0, 1.5])
def test_intervals_cover_the_true_difference_as_often_as_they_say(
    effect: float, seeds: int
) -> None:
    found = compare(simulated(effect, seeds, 4000 if seeds == 8 else STUDIES))
    covered = np.mean((found.low <= effect) & (effect <= found.high))
    assert abs(covered - (1 - LEVEL)) < 0.02


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_tests_find_what_is_not_there_as_often_as_they_say(seeds: int) -> None:
    found = compare(simulated(0.0, seeds, 4000 if seeds == 8 else STUDIES, draw=1))
    assert abs(np.mean(found.p_t < LEVEL) - LEVEL) < 0.02
    # An exact test has the size that its steps allow, at every step.
    for step in np.arange(1, 2 ** (seeds - 1)) * least_p_signs(seeds):
        assert abs(np.mean(found.p_signs <= step + 1e-9) - step) < 0.02


@pytest.mark.parametrize(("seeds", "claims"), [(3, 1), (5, 1), (5, 4), (8, 3)])
def test_what_could_have_been_seen_is_seen_with_the_power_that_is_said(
    seeds: int, claims: int
) -> None:
    deviation = 2**0.5
    shift, limit = (
        detectable(seeds, claims) * seeds**0.5,
        stats.t.ppf(1 - 0.025 / claims, seeds - 1),
    )
    assert stats.nct.sf(limit, seeds - 1, shift) == pytest.approx(POWER, abs=2e-3)
    found = compare(simulated(detectable(seeds, claims) * deviation, seeds, 8000, draw=2))
    assert abs(np.mean(found.p_t < LEVEL / claims) - POWER) < 0.02


def test_holm_errs_in_a_family_as_often_as_it_says() -> None:
    claims, families = 4, 2000
    p_t = compare(simulated(0.0, 5, families * claims, draw=3)).p_t.reshape(families, claims)
    wrong = np.mean([min(holm(row)) < LEVEL for row in p_t.tolist()])
    assert abs(wrong - LEVEL) < 0.02


def test_holm_is_the_smallest_level_at_which_its_steps_reject() -> None:
    generator = np.random.default_rng(4)
    for _ in range(200):
        p = generator.uniform(size=generator.integers(1, 7)) ** 2
        for level in (0.01, 0.05, 0.2, 0.9):
            rejected = set()
            for step, place in enumerate(np.argsort(p)):
                if p[place] > level / (len(p) - step):
                    break
                rejected.add(int(place))
            assert {i for i, value in enumerate(holm(p.tolist())) if value <= level} == rejected


def test_the_sign_flip_test_counts_every_pattern_of_signs() -> None:
    for seed in range(20):
        differences = np.random.default_rng(seed).normal(0.5, 1, 6)
        signs = np.array(list(product((1, -1), repeat=6)))
        means = (signs * differences).mean(axis=1)
        wanted = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
        assert compare(differences).p_signs == pytest.approx(wanted)
    assert compare(np.array([1.0, 2.0, 3.0])).p_signs == least_p_signs(3) == 0.25


def test_interval_test_and_effect_are_those_of_scipy() -> None:
    one, other = np.random.default_rng(5).normal(0, 1, (2, 7))
    theirs, found = stats.ttest_rel(one, other), compare(one - other)
    interval = theirs.confidence_interval(0.95)
    assert (found.low, found.high, found.p_t) == pytest.approx((*interval, theirs.pvalue))
    assert found.effect == pytest.approx(found.mean / found.deviation * hedges(6))
    assert hedges(4) == pytest.approx(0.7979, abs=1e-4)  # 1 - 3 / (4 df - 1) = 0.8


def test_differences_without_spread_have_no_t_test() -> None:
    found = compare(np.array([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [0.4, 0.5, 0.7]]))
    assert np.isnan(found.p_t).tolist() == [True, True, False]
    assert np.isnan(found.effect).tolist() == [True, True, False]
    assert found.p_signs[:2].tolist() == [0.25, 1.0]
    with pytest.raises(ValueError, match="at least two seeds, found 1"):
        compare(np.array([0.5]))
