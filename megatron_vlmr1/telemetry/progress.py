"""How far this process has got, for whoever watches it from another thread.

Phases come from `PhaseTimers`; `mark` is called in what may take long within one: a tick of generation, a
micro-batch, a parameter that is read or written, a prompt that the data has given, ranks that have agreed. So a
process that makes no progress for the process group's timeout is stuck, however long its phase may take.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable


class Progress:
    """Written by the main thread, read by others.

    Attributes:
        step: steps done; None until training starts.
        resumed: steps done when training started.
        phase: the innermost open phase, or "after ..." between two.
        phases: phases entered and left so far, the same on all ranks at the same place.
        marks: calls of `mark`.
        asked: the signal that asked this process to stop, if one did.
        since: when the phase began, in seconds of ``time.monotonic``.
        show: is told the step and phase at once, as "2:rollout", for whoever cannot ask this process any more.
        waits: seconds of each phase in which this rank waited for others, as the watchdog samples them.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.resumed = 0
        self.phase = "start"
        self.phases = 0
        self.marks = 0
        self.asked = ""
        self.since = time.monotonic()
        self.show: Callable[[str], object] = str
        self.waits: defaultdict[str, float] = defaultdict(float)

    def begin(self, step: int) -> None:
        """Training starts after `step` steps."""
        self.step = self.resumed = step

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        self.phase, self.since = phase, time.monotonic()
        self.phases += 1
        self.show(f"{'-' if self.step is None else self.step}:{phase}")

    def take_waits(self) -> dict[str, float]:
        """Return `waits` since the last call and start from zero."""
        taken, self.waits = self.waits, defaultdict(float)
        return dict(taken)


here = Progress()


def mark() -> None:
    """This process has got further within its phase."""
    here.marks += 1
