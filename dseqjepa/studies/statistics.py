"""Statistics of paired differences over seeds: interval, tests, effect size, detectable difference.

A difference is one variant's result minus the other's for the same seed. The last axis holds the
seeds; all other axes are batch axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

LEVEL, POWER = 0.05, 0.8
MOST_FLIPS = 2**16
"""Up to 16 seeds, all sign patterns are enumerated; for more seeds, this many are sampled."""
QUANTILES = 4096
Floats = NDArray[np.float64]


class Comparison(NamedTuple):
    """Statistics of differences with shape (..., seeds); each field has shape (...)."""

    mean: Floats
    deviation: Floats
    """Standard deviation of the differences over seeds."""
    low: Floats
    """Lower end of the 95 % interval of the mean, by Student's t."""
    high: Floats
    p_t: Floats
    """P-value of the two-sided paired t test; NaN if all differences are equal."""
    p_signs: Floats
    """P-value of the two-sided sign-flip permutation test of the mean; exact up to 16 seeds."""
    effect: Floats
    """Mean / deviation with Hedges' correction for few seeds; NaN where `p_t` is."""


def compare(differences: Floats) -> Comparison:
    """The statistics of paired differences (..., seeds), with at least two seeds."""
    count = differences.shape[-1]
    if count < 2:
        raise ValueError(f"a test needs at least two seeds, found {count}")
    mean, deviation = differences.mean(axis=-1), differences.std(axis=-1, ddof=1)
    spread = np.ptp(differences, axis=-1) > 0
    error = deviation / count**0.5
    half = stats.t.ppf(1 - LEVEL / 2, count - 1) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        p_t = np.where(spread, stats.ttest_1samp(differences, 0, axis=-1).pvalue, np.nan)
        effect = np.where(spread, mean / deviation, np.nan) * hedges(count - 1)
    flips = stats.permutation_test(
        (differences,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=MOST_FLIPS,
        rng=np.random.default_rng(0),
        axis=-1,
    )
    return Comparison(mean, deviation, mean - half, mean + half, p_t, flips.pvalue, effect)


def hedges(freedom: int) -> float:
    """Hedges' correction factor of a standardized mean with these degrees of freedom."""
    logs = special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2) if freedom > 1 else 0.0
    return float(np.exp(logs) / (freedom / 2) ** 0.5) if freedom > 1 else 1.0


def least_p_signs(count: int) -> float:
    """The smallest p-value that the sign-flip test can reach with `count` seeds."""
    return float(2.0 ** (1 - count))


@cache
def detectable(count: int, claims: int) -> float:
    """The true mean difference, in standard deviations of the differences, that a two-sided t test
    of `count` pairs detects with power 0.8 at level 0.05 / `claims`, Holm's first step."""
    freedom = count - 1
    limit = stats.t.ppf(1 - LEVEL / claims / 2, freedom)

    # P(|T| > limit) is averaged over the estimated deviation; scipy's nct fails far from 0.
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    limits = limit * (stats.chi2.ppf(quantiles, freedom) / freedom) ** 0.5

    def power(shift: float) -> float:
        return float(np.mean(stats.norm.sf(limits - shift) + stats.norm.cdf(-limits - shift)))

    found = optimize.brentq(lambda shift: power(shift) - POWER, 0.0, 10.0 * limit)
    return float(found) / count**0.5


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of claims (Holm, 1979), in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return [float(value) for value in adjusted]
