"""Intervals: Student's over seeds, a cluster bootstrap of items within seeds, and the exact binomial one.

Every interval is two-sided. The bootstrap gives a standard error, not percentiles: with five clusters the percentiles of
a bootstrap are far too narrow (it says "holds" under the null several times too often), while its standard error,
corrected for the number of clusters and multiplied by Student's quantile, keeps the level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.errors import InvalidEvidence


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided confidence interval, and what it was computed from."""

    estimate: float
    low: float
    high: float
    num_seeds: int
    method: str
    num_items: int | None = None
    level: float = 0.95


def t_interval(differences: ArrayLike, level: float = 0.95) -> Interval:
    """Student's interval of the mean of paired differences, one number a seed.

    Equal differences give an interval of no width. Raises `InvalidEvidence` on fewer than two values, NaN or infinity.
    """
    values = _finite(differences)
    half = _student_quantile(level, values.size) * values.std(ddof=1) / math.sqrt(values.size)
    mean = float(values.mean())
    return Interval(mean, float(mean - half), float(mean + half), num_seeds=values.size, method="paired t", level=level)


def cluster_bootstrap_interval(clusters: Sequence[ArrayLike], level: float = 0.95) -> Interval:
    """Interval of the mean over seeds of the mean over items, as if seeds were resampled, then items within each.

    The variance of such a bootstrap has a closed form, (variance of the seed means + mean over seeds of the variance of
    an item mean) / n, so nothing is drawn. The half width is its root times sqrt(n / (n - 1)), which undoes the
    bootstrap's shrinkage for n seeds, times Student's quantile with n - 1 degrees of freedom. Since seed means already
    vary with their items, the interval is on the safe side: up to sqrt(2) too wide when seeds do not differ at all.
    Items may differ in number between seeds.
    """
    seeds = [_finite(items, minimum=1) for items in clusters]
    n = len(seeds)
    if n < 2:
        raise InvalidEvidence(f"A cluster bootstrap resamples seeds and needs at least two; it got {n}.")
    means = np.array([items.mean() for items in seeds])
    variance = (means.var() + np.mean([items.var() / items.size for items in seeds])) / n
    half = _student_quantile(level, n) * math.sqrt(variance * n / (n - 1))
    mean = float(means.mean())
    return Interval(
        mean,
        float(mean - half),
        float(mean + half),
        num_seeds=n,
        num_items=sum(items.size for items in seeds),
        method="cluster bootstrap",
        level=level,
    )


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Exact (Clopper-Pearson) interval of a proportion."""
    from scipy.stats import binomtest

    if trials < 1 or not 0 <= successes <= trials:
        raise InvalidEvidence(f"{successes} successes in {trials} trials is not a proportion.")
    exact = binomtest(successes, trials).proportion_ci(level, method="exact")
    return Interval(
        successes / trials,
        float(exact.low),
        float(exact.high),
        num_seeds=1,
        num_items=trials,
        method="exact binomial",
        level=level,
    )


def _student_quantile(level: float, n: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, n - 1))


def _finite(values: ArrayLike, minimum: int = 2) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size < minimum:
        raise InvalidEvidence(f"An interval needs at least {minimum} numbers in one row; it got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise InvalidEvidence(
            f"A difference is NaN or infinite (position {int(np.flatnonzero(~np.isfinite(array))[0])}); "
            "a run that diverged is a result to be reported, not averaged."
        )
    return array
