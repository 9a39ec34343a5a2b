"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_vlmr1.telemetry import progress

PHASES = ("data", "rollout", "reward_exposed", "logprobs", "update", "evaluate", "save_exposed")
"""The phases of a step; a metric that names one gives its place here."""


class PhaseTimers:
    """``with timers("rollout"): …`` adds to that phase until `take`.

    A phase inside another is counted for itself alone: its seconds are not the outer one's, so phases add up to
    at most the step. `telemetry.progress` knows which one is open.

    Args:
        synchronize: called at both ends of a phase, so that queued device work counts where it was asked for
            (``torch.cuda.synchronize``); None where nothing is queued.
        clock: monotonic seconds.

    Attributes:
        spans: (phase, begin, end) of the phases that the last `take` took, in the order of their ends; seconds of
            `clock`, phases within phases included.
    """

    def __init__(
        self, synchronize: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0
        self._spans: list[tuple[str, float, float]] = []
        self.spans: list[tuple[str, float, float]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`."""
        begin = self._switch()
        self._open.append(phase)
        progress.here.enter(phase)
        self._seconds.setdefault(phase, 0.0)
        try:
            yield
        finally:
            end = self._switch()
            self._open.pop()
            self._spans.append((phase, begin, end))
            progress.here.enter(self._open[-1] if self._open else f"after {phase}")

    def seconds(self, phase: str) -> float:
        """Return the seconds of a phase since the last `take`."""
        return self._seconds.get(phase, 0.0)

    def take(self) -> dict[str, float]:
        """Return ``{"time/<phase>": seconds}`` since the last call and start from zero. Call it outside phases."""
        assert not self._open, f"phase {self._open[-1]} is still open"
        taken = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        self.spans, self._spans = self._spans, []
        return taken

    def wall_spans(self) -> list[tuple[str, float, float]]:
        """Return `spans` in seconds of ``time.time``."""
        offset = time.time() - self._clock()
        return [(phase, begin + offset, end + offset) for phase, begin, end in self.spans]

    def _switch(self) -> float:
        """Credit the time since the last switch to the innermost open phase; return what the clock says."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now
        return now
