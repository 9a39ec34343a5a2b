"""What the parts of `tools/bench/gpu.py` share: cases and their rows, the clock, seconds of the device's work."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from megatron_vlmr1.runtime import device
from tools.bench import common

_WINDOW_S = 0.02  # calls are timed together until they take so long: an event's own time is some microseconds
_MOST_CALLS = 200


class NotMeasured(Exception):
    """Why a case has no figures."""


@dataclass(frozen=True)
class Row:
    """What a case came to.

    Attributes:
        figures: by name; the unit is the name's end.
        setting: what was run, in words.
        flops: useful ones of `seconds`, for the roofline; 0 for none.
        bytes: that have to move to and from the device's memory in `seconds`, at least.
        seconds: of `flops` and `bytes`.
    """

    figures: dict[str, float]
    setting: str
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        tiny: whether shapes are so small that a CPU does it all in seconds.
        limit_s: seconds of the whole run.
        keep: called with all rows whenever there is another one.
        rows: those so far, as the document has them.
        ceilings: what the device reaches: ``bf16`` and ``fp8`` in FLOP/s, ``copy`` in bytes/s.
        rates: by the names of `plan.fit.RATES`.
    """

    tiny: bool
    limit_s: float
    keep: Callable[[Sequence[dict[str, Any]]], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    _part: str = ""
    _began: float = field(default_factory=time.monotonic)
    _end: float = math.inf  # of the part

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return device.has_cuda()

    @property
    def spent_s(self) -> float:
        """Seconds since the benchmark began."""
        return time.monotonic() - self._began

    def begin(self, part: str, share: float) -> None:
        """Begin a part, which ends when `share` of the whole time has passed."""
        self._part, self._end = part, self._began + share * self.limit_s
        common.note(f"{self.spent_s:.0f} s: {part}")

    def case(self, name: str, measure: Callable[[], Row], needs_s: float = 0.0) -> Row | None:
        """Measure one case and keep its row; where that cannot be, the row says why.

        Args:
            name: within its part.
            measure: what to do; it may raise anything.
            needs_s: seconds that it takes, about.
        """
        row: Row | None = None
        found: dict[str, Any] = {"part": self._part, "case": name}
        try:
            if (left := self._end - time.monotonic()) < needs_s * (not self.tiny):
                raise NotMeasured(f"the time is up: it needs about {needs_s:.0f} s, and {max(0.0, left):.0f} are left")
            row = measure()
            found |= asdict(row)
            common.note(f"  {name}: {in_words(row.figures)}")
        except (NotMeasured, ValueError) as reason:  # the latter is what the program itself refuses
            found["not_measured"] = _line(reason)
        except torch.OutOfMemoryError as error:
            found["not_measured"] = f"out of memory: {_line(error)}"
        except Exception as error:  # one case must not cost the others
            traceback.print_exc(file=sys.stderr)
            found["not_measured"] = f"{type(error).__name__}: {_line(error)}"
        if row is None:
            common.note(f"  {name}: not measured: {found['not_measured']}")
        self.rows.append(found)
        self.keep(self.rows)
        free()
        return row

    def seconds(self, function: Callable[[], object], repeats: int = 5, warm_up: int = 2) -> float:
        """Return the seconds of one call on the device, the median of `repeats` after `warm_up` others (1 or more)."""
        repeats, warm_up = (min(repeats, 2), 1) if self.tiny else (repeats, warm_up)
        once = [self._timed(function, 1) for _ in range(warm_up)][-1]
        calls = max(1, min(_MOST_CALLS, int(_WINDOW_S / max(once, 1e-7)))) if self.cuda else 1
        return statistics.median(self._timed(function, calls) for _ in range(repeats))

    def _timed(self, function: Callable[[], object], calls: int) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - begin) / calls
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    def wall_seconds(self, function: Callable[[], object], repeats: int = 3) -> float:
        """Return the seconds of one call, the host's work included, the least of `repeats`."""
        found = []
        for _ in range(repeats):
            self.wait()
            begin = time.perf_counter()
            function()
            self.wait()
            found.append(time.perf_counter() - begin)
        return min(found)

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def share(self, name: str, value: float) -> dict[str, float]:
        """Return ``{"of_NAME": value / ceiling}``, nothing where that ceiling was not measured."""
        return {f"of_{name}": value / self.ceilings[name]} if name in self.ceilings else {}


def free() -> None:
    """Give back the device's memory that nobody needs any more."""
    if device.has_cuda():
        gc.collect()
        torch.cuda.empty_cache()


def in_words(figures: dict[str, float]) -> str:
    """Return figures in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or repr(error))[:300]
