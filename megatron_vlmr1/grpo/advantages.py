"""Advantages: pure functions of a group's scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megatron_vlmr1.types import FloatArray, Group

STD_EPS = 1e-4


def group_advantages(values: FloatArray) -> FloatArray:
    """Return (r - mean) / (std + 1e-4), std unbiased, as published (arXiv 2504.07615, section 3.1 and its code).

    Args:
        values: [G] scores of one group, NaN where the reward failed.

    Returns:
        [G] float32; NaN where there is no score, and everywhere when fewer than two are left to compare.
    """
    return _among_scored(values, lambda r: (r - r.mean()) / (r.std(ddof=1) + STD_EPS))


def centred_advantages(values: FloatArray) -> FloatArray:
    """Return r - mean: a group of little spread gains no weight (Dr. GRPO, arXiv 2503.20783).

    Args and returns as `group_advantages`.
    """
    return _among_scored(values, lambda r: r - r.mean())


def leave_one_out_advantages(values: FloatArray) -> FloatArray:
    """Return each score less the mean of the others, (r - mean) n / (n - 1) of n scores (RLOO, arXiv 2402.14740).

    Args and returns as `group_advantages`.
    """
    return _among_scored(values, lambda r: (r - r.mean()) * (len(r) / (len(r) - 1)))


def score_values(group: Group) -> FloatArray:
    """Return a group's scores [G], NaN where the reward failed."""
    return np.array([np.nan if s.value is None else s.value for s in group.scores], dtype=np.float32)


def scores_differ(group: Group) -> bool:
    """Whether the group has two unlike scores: without them every advantage is zero or missing."""
    values = score_values(group)
    scored = values[np.isfinite(values)]
    return len(scored) >= 2 and bool(scored.max() > scored.min())


def _among_scored(
    values: FloatArray, compare: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> FloatArray:
    scored = np.isfinite(values)
    out = np.full(values.shape, np.nan, dtype=np.float32)
    if scored.sum() >= 2:
        out[scored] = compare(values[scored].astype(np.float64)).astype(np.float32)
    return out
