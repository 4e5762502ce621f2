"""What paired differences over seeds say: interval, tests, effect size, what could have been seen.

A difference is one variant's number less the other's of the same seed. The last axis is the seeds;
all axes before it are computed at once.
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
"""Up to 16 seeds, every pattern of signs is counted; for more seeds this many are drawn."""
QUANTILES = 4096
Floats = NDArray[np.float64]


class Comparison(NamedTuple):
    """Of differences with shape (..., seeds); each field has shape (...)."""

    mean: Floats
    deviation: Floats
    """Standard deviation of the differences over seeds."""
    low: Floats
    """Ends of the 95 % interval of the mean, by Student's t."""
    high: Floats
    p_t: Floats
    """Of the paired t test, two-sided; nan where all differences are equal."""
    p_signs: Floats
    """Of the sign-flip permutation test of the mean, two-sided; exact up to 16 seeds."""
    effect: Floats
    """Mean / deviation, Hedges' correction for few seeds applied; nan as `p_t`."""


def compare(differences: Floats) -> Comparison:
    """The statistics of paired differences (..., seeds), two seeds at least."""
    count = differences.shape[-1]
    if count < 2:
        raise ValueError(f"a test needs two seeds at least, found {count}")
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
    """Hedges' correction of a standardised mean for its degrees of freedom."""
    logs = special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2) if freedom > 1 else 0.0
    return float(np.exp(logs) / (freedom / 2) ** 0.5) if freedom > 1 else 1.0


def least_p_signs(count: int) -> float:
    """The smallest p-value that the sign-flip test can give with `count` seeds."""
    return float(2.0 ** (1 - count))


@cache
def detectable(count: int, claims: int) -> float:
    """The true mean difference, in standard deviations of the differences, that a two-sided t test
    of `count` pairs finds with power 0.8 at level 0.05 / `claims`, the first step of Holm's."""
    freedom = count - 1
    limit = stats.t.ppf(1 - LEVEL / claims / 2, freedom)

    # P(|T| > limit) is a mean over the estimated deviation; scipy's nct fails far from 0.
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    limits = limit * (stats.chi2.ppf(quantiles, freedom) / freedom) ** 0.5

    def power(shift: float) -> float:
        return float(np.mean(stats.norm.sf(limits - shift) + stats.norm.cdf(-limits - shift)))

    found = optimize.brentq(lambda shift: power(shift) - POWER, 0.0, 10.0 * limit)
    return float(found) / count**0.5


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of a family of claims, in the order given (Holm, 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return [float(value) for value in adjusted]
