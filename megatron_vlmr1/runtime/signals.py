"""A request to stop, kept until the loop has time for it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from megatron_vlmr1.telemetry import progress


class StopFlag:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1 instead of dying of it.

    Handlers are installed at once and only set the flag, so a step is never torn in the middle; further signals change
    nothing. Make it in the main thread before the slow imports: until then a signal ends the process.
    Use it as a context manager to put the former handlers back.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self._name: str | None = None
        self._former: dict[signal.Signals, Any] = {}
        for number in self.SIGNALS:
            self._former[number] = signal.signal(number, self._remember)

    @property
    def requested(self) -> str | None:
        """Name of the first signal that came ("SIGTERM"), or None."""
        return self._name

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def __enter__(self) -> StopFlag:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._name is None:
            self._name = progress.here.asked = signal.Signals(number).name
