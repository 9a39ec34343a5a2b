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
        peak_bytes: returns the most memory that was in use since it was called last; None where nothing counts it.

    Attributes:
        spans: (phase, begin, end) of the phases that the last `take` took, in the order of their ends; seconds of
            `clock`, phases within phases included.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        peak_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._peak_bytes = peak_bytes
        self._peaks: dict[str, int] = {}
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
        """Return ``time/<phase>``, seconds since the last call, and start from zero. Call it outside phases."""
        assert not self._open, f"phase {self._open[-1]} is still open"
        taken = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        self.spans, self._spans = self._spans, []
        return taken

    @property
    def counts_memory(self) -> bool:
        """Whether `take_peaks` has something to say."""
        return self._peak_bytes is not None

    def take_peaks(self) -> dict[str, int]:
        """Return the most bytes of memory that were in use in each phase since the last call."""
        taken, self._peaks = self._peaks, {}
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
        peak = self._peak_bytes() if self._peak_bytes is not None else None
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
            if peak is not None:
                self._peaks[self._open[-1]] = max(peak, self._peaks.get(self._open[-1], 0))
        self._since = now
        return now
