"""Exit codes, and the one exception that carries one."""

from __future__ import annotations

DONE = 0
DIFFERS = 1  # a check found differences or damage
BAD_INPUT = 2  # the user's input is wrong
STOPPED = 17  # stopped itself; requeueing would not help
CRASHED = (
    70  # an error of ours, or a rank that hangs; sysexits.h EX_SOFTWARE, because 1 says that a check found differences
)
REQUEUE = 85  # checkpointed on a signal or time limit; please requeue


class RunStopped(Exception):
    """The run ends itself with `code` (17 or 85) for `reason`, after `step` steps if known; all ranks raise it."""

    def __init__(self, code: int, reason: str, step: int | None = None) -> None:
        super().__init__(reason)
        self.step = step
        self.code = code
        self.reason = reason
