"""A wall-clock bound on one call, for libraries that may take forever on hostile text."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from megatron_vlmr1.rewards.item import RewardFailure

_T = TypeVar("_T")
_AGAIN_S = 0.05  # a library that swallows the interrupt is interrupted again
_looking = False  # whether a signal's handler is under way


class _Interrupt(BaseException):
    """Not an Exception, which libraries catch and go on."""


def within(seconds: float, function: Callable[[], _T], blamed: str = "too_hard") -> _T:
    """Return ``function()``, or give up after `seconds` of wall-clock time.

    Works in the main thread, where signals are delivered; a timer that was running goes on afterwards, at most
    `seconds` late. In another thread there is no bound but the one around it: the reward service kills a process at
    its deadline. One operation of the interpreter (a power of large integers) is not interrupted.

    Raises:
        RewardFailure: out of time; the reason begins with `blamed`.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    before = signal.signal(signal.SIGALRM, _interrupt)
    started = time.monotonic()
    outer_delay, outer_interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        return _bounded(function)
    except _Interrupt:
        raise RewardFailure(f"{blamed}: no result within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_delay:
            left = outer_delay - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), outer_interval)


def _bounded(function: Callable[[], _T]) -> _T:
    return function()


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Raise where a bounded call is under way, not where its timer rings as it is being switched off."""
    global _looking
    if _looking:  # it takes longer than the timer, which rings again
        return
    _looking = True
    try:
        while frame is not None and frame.f_code is not _bounded.__code__:
            frame = frame.f_back
    finally:
        _looking = False
    if frame is not None:
        raise _Interrupt
