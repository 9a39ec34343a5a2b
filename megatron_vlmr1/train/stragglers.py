"""Which rank is slow, in which phase, and by how much."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_vlmr1.runtime import distributed
from megatron_vlmr1.telemetry.timers import PHASES

logger = logging.getLogger(__name__)

FACTOR = 1.5  # times the median of the others
SHARE = 0.05  # of a step, at least, that the others could be faster
STEPS = 3  # in a row, before it is worth a line
# Phases in which some ranks have work that the others wait for by design: there all of a phase counts.
_SHARED = ("reward_exposed", "evaluate", "save_exposed")


@dataclass(frozen=True)
class Straggler:
    """The rank and phase that cost most: `seconds` against the `median_s` of the other ranks."""

    rank: int
    phase: str
    seconds: float
    median_s: float

    @property
    def excess_s(self) -> float:
        """Seconds more than the median of the others."""
        return self.seconds - self.median_s

    @property
    def ratio(self) -> float:
        """How many times as long as the median of the others; those that took less than 1 ms count as 1 ms."""
        return self.seconds / max(self.median_s, 1e-3)


def slowest(table: Sequence[Sequence[float]]) -> Straggler:
    """Return the rank and phase that are furthest above the others' median. `table` [ranks >= 2, phases] in seconds."""
    found = [
        Straggler(rank, phase, row[i], statistics.median(other[i] for r, other in enumerate(table) if r != rank))
        for rank, row in enumerate(table)
        for i, phase in enumerate(PHASES)
    ]
    return max(found, key=lambda straggler: straggler.excess_s)


def own_s(phase: str, total_s: float, waited_s: float) -> float:
    """Return the seconds of a phase that this rank is answerable for."""
    return total_s if phase in _SHARED else max(0.0, total_s - waited_s)


class Stragglers:
    """Compares the ranks after every step; one line when the same one is slow for several steps in a row."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._row = 0
        self._last: tuple[int, str] | None = None

    def compare(self, times: Mapping[str, float], waits: Mapping[str, float], step_s: float) -> dict[str, float]:
        """Return ``straggler/{rank,phase,ratio,excess_s}``; all ranks call it, nothing comes of one rank alone.

        Args:
            times: ``time/<phase>`` of this rank.
            waits: seconds of each phase in which this rank waited in collectives; it is the others who were slow then.
                In rewards, evaluation and saves waiting counts: there the first ranks do what others wait for.
            step_s: seconds of the step.

        The phase is its place in `PHASES`.
        """
        if self._world == 1:
            return {}
        own = [own_s(phase, times.get(f"time/{phase}", 0.0), waits.get(phase, 0.0)) for phase in PHASES]
        found = slowest(distributed.every_row(torch.tensor(own, dtype=torch.float32)).tolist())
        self._tell(found, step_s)
        return {
            "straggler/rank": float(found.rank),
            "straggler/phase": float(PHASES.index(found.phase)),
            "straggler/ratio": found.ratio,
            "straggler/excess_s": found.excess_s,
        }

    def _tell(self, found: Straggler, step_s: float) -> None:
        slow = found.ratio >= FACTOR and found.excess_s >= SHARE * step_s
        who = (found.rank, found.phase)
        self._row = (self._row + 1 if who == self._last else 1) if slow else 0
        self._last = who if slow else None
        if self._row == STEPS:
            logger.warning(
                "rank %d is slow in phase %r: %.2f s, %.1f times the %.2f s that the other ranks' median takes, "
                "for %d steps in a row",
                found.rank,
                found.phase,
                found.seconds,
                found.ratio,
                found.median_s,
                STEPS,
            )
