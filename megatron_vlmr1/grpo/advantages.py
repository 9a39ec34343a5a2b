"""Advantages: pure functions of a group's scores."""

from __future__ import annotations

import numpy as np

from megatron_vlmr1.types import FloatArray, Group

STD_EPS = 1e-4


def group_advantages(values: FloatArray) -> FloatArray:
    """Return (r - mean) / (std + 1e-4), std unbiased, as published (arXiv 2504.07615, section 3.1 and its code).

    Args:
        values: [G] scores of one group, NaN where the reward failed.

    Returns:
        [G] float32; NaN where there is no score, and everywhere when fewer than two are left to compare.
    """
    scored = np.isfinite(values)
    out = np.full(values.shape, np.nan, dtype=np.float32)
    if scored.sum() >= 2:
        r = values[scored].astype(np.float64)
        out[scored] = ((r - r.mean()) / (r.std(ddof=1) + STD_EPS)).astype(np.float32)
    return out


def score_values(group: Group) -> FloatArray:
    """Return a group's scores [G], NaN where the reward failed."""
    return np.array([np.nan if s.value is None else s.value for s in group.scores], dtype=np.float32)
