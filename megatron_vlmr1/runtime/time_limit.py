"""When to stop so that the last checkpoint is there before somebody ends the job."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping

import psutil

_SLURM_MARGIN_S = 60.0  # before the end of a SLURM job: what follows the save, and an end that comes a little early
_LEAVE_S = 5.0
_SLACK = 1.2  # steps and saves may take longer than those that were measured
_STEPS = 5  # the longest of so many last steps stands for the next one


class TimeLimit:
    """Compares what is left until a deadline with what the next step and a save would take; `reason` once it is near.

    Before a save was measured, it is taken to last as long as the start did, which reads what a save writes.
    """

    def __init__(
        self,
        exit_before_s: float | None,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
        started: float | None = None,
    ) -> None:
        """The deadline is `exit_before_s` seconds after `started`, or the end of the SLURM job if that comes earlier.

        Args:
            exit_before_s: None sets no limit.
            environ: where SLURM_JOB_END_TIME may be, in seconds since 1970.
            clock: seconds since 1970.
            started: when the attempt started; when this process did by default.
        """
        self._clock = clock
        self._started = psutil.Process().create_time() if started is None else started
        ends: dict[str, float] = {}
        if exit_before_s is not None:
            ends[f"train.exit_before={exit_before_s:g} s"] = self._started + exit_before_s
        if environ.get("SLURM_JOB_END_TIME", "").isdecimal():
            ends["the end of the SLURM job"] = float(environ["SLURM_JOB_END_TIME"]) - _SLURM_MARGIN_S
        self._name = min(ends, key=ends.__getitem__, default="")
        self._end = ends.get(self._name)
        self.reason = ""
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._save_s: float | None = None
        self._evaluate_s = 0.0
        self._ready_s = 0.0

    def ready(self) -> None:
        """The first step is about to begin."""
        self._ready_s = self._clock() - self._started

    def note(self, step_s: float, save_s: float = 0.0) -> None:
        """Remember how long a step took by itself, and the save before it where there was one."""
        self._steps.append(step_s)
        self._save_s = save_s or self._save_s

    def note_evaluation(self, seconds: float) -> None:
        """Remember how long an evaluation took."""
        self._evaluate_s = seconds

    def is_near(self, evaluates: bool = False, saves: bool = False) -> bool:
        """Whether another step and a save would end too late, with an evaluation or another save before them or not."""
        if self._end is None:
            return False
        save_s = self._ready_s if self._save_s is None else self._save_s
        needed_s = max(self._steps, default=0.0) + (1 + saves) * save_s + evaluates * self._evaluate_s
        near = self._clock() + _SLACK * needed_s + _LEAVE_S > self._end
        self.reason = f"its time limit, {self._name}" if near else ""
        return near
