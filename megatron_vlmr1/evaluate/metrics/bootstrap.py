"""Percentile intervals by resampling the samples of a split with replacement (Efron 1979), seeded and vectorised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
_LEVEL = 0.95
_CHUNK = 1 << 22  # numbers of a resample that are held at a time


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def weights(samples: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each resample drew each sample, [r, samples] at a time, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    most = max(1, _CHUNK // samples)
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        drawn = rng.integers(samples, size=(rows, samples)) + np.arange(rows)[:, None] * samples
        yield np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples).astype(np.float64)


def estimate(
    statistic: Callable[[Floats], Floats], samples: int, seed: int, resamples: int = RESAMPLES
) -> list[Estimate]:
    """Return the estimates of a statistic of weighted samples.

    Args:
        statistic: weights [r, samples] -> values of each figure [r, figures]; NaN where a resample does not define it.
        samples: number of samples, at least one.
        seed: of the resampling.
        resamples: how many.
    """
    values = statistic(np.ones((1, samples)))[0]
    drawn = np.concatenate([statistic(chunk) for chunk in weights(samples, resamples, seed)])
    tail = 50 * (1 - _LEVEL)
    return [
        Estimate(float(value), *_percentiles(column[np.isfinite(column)], tail))
        for value, column in zip(values, drawn.T, strict=True)
    ]


def means(values: Floats, seed: int, resamples: int = RESAMPLES) -> list[Estimate]:
    """Return the estimates of the columns' means; `values` is [samples, figures], NaN is left out of a mean."""
    known, filled = _known(values)
    return estimate(lambda w: ratio(w @ filled, w @ known), len(values), seed, resamples)


def column_means(values: Floats) -> Floats:
    """Return the columns' means alone, as `means` takes them."""
    known, filled = _known(values)
    return ratio(filled.sum(0), known.sum(0))


def ratio(above: Floats, below: Floats) -> Floats:
    """Return above / below, NaN where below is 0."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _known(values: Floats) -> tuple[Floats, Floats]:
    known = np.isfinite(values)
    return known.astype(np.float64), np.where(known, values, 0.0)


def _percentiles(column: Floats, tail: float) -> tuple[float, float]:
    if not len(column):
        return float("nan"), float("nan")
    low, high = np.percentile(column, (tail, 100 - tail))
    return float(low), float(high)
