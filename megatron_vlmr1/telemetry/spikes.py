"""Losses and gradient norms that stand out from those of the last steps."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

_FLAGS = {"train/loss": "train/loss_spike", "train/grad_norm": "train/grad_spike"}
_MIN_STEPS = 10  # before there is anything to compare with
_SMALLEST = 1e-3  # of the median, and of a median of 1e-3 at least: a deviation that every figure is granted


class Spikes:
    """Flags a figure above the median of the last steps by `factor` times their median deviation from it.

    Deviations and not multiples, since GRPO's loss is about zero. A spike counts in the figures that follow, which
    hardly move a median; steps that were skipped do not. What is remembered is part of the checkpoint, so a resumed run
    flags the same steps.

    Attributes:
        recent: metric name to its last values, oldest first; JSON values, the same on all ranks.
    """

    def __init__(self, factor: float, window: int, recent: Mapping[str, Sequence[float]] | None = None) -> None:
        """Take up what an earlier attempt has seen; 0 `factor` flags nothing."""
        self._factor, self._window = factor, window
        self.recent: dict[str, list[float]] = {name: list((recent or {}).get(name, ())) for name in _FLAGS}

    def flags(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return ``train/loss_spike`` and ``train/grad_spike`` of a step that was trained, 0 or 1; log what is flagged.

        Args:
            step: the step that was just done, counted from 0.
            metrics: its numbers; those that are missing, not finite or of a skipped step are not looked at.
        """
        if not self._factor or metrics.get("train/skipped", 0.0):
            return {}
        out: dict[str, float] = {}
        for name, flag in _FLAGS.items():
            value, recent = metrics.get(name, math.nan), self.recent[name]
            if not math.isfinite(value):
                continue
            if len(recent) >= _MIN_STEPS:
                median = statistics.median(recent)
                deviation = statistics.median(abs(x - median) for x in recent)
                limit = median + self._factor * max(deviation, _SMALLEST * max(1e-3, abs(median)))
                out[flag] = float(value > limit)
                if value > limit:
                    log.warning("step %d: %s is %.3g; the last steps' median is %.3g", step + 1, name, value, median)
            recent.append(value)
            del recent[: -self._window]
        return out
