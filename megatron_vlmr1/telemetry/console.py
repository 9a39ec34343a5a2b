"""One readable line per step."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import suppress

# label, metric, format; shown where the step has the metric
_FIELDS = (
    ("loss", "train/loss", ".4f"),
    ("reward", "reward/mean", ".3f"),
    ("format", "reward/format", ".2f"),
    ("kl", "grpo/kl", ".2g"),
    ("entropy", "grpo/entropy", ".2f"),
    ("length", "rollout/length_mean", ".1f"),
    ("grad", "train/grad_norm", ".2g"),
)


def console_line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """Return the step's main numbers as one line of plain text.

    Args:
        step: the step that was just done, counted from 0.
        steps: steps of the whole run.
        metrics: names as in ``metrics.jsonl``; ``perf/step_s`` gives the step time and the time left.
    """
    return "  ".join(f"{label} {value}" for label, value in _pieces(step, steps, metrics))


def print_line(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    """Print `console_line` to stderr: with rich's colours on a terminal, plain in a log."""
    with suppress(OSError):  # stderr may be a file on a full disk, or a terminal that was closed
        if sys.stderr.isatty():
            _print_in_colour(step, steps, metrics)
        else:
            print(console_line(step, steps, metrics), file=sys.stderr, flush=True)


def _print_in_colour(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text()
    for index, (label, value) in enumerate(_pieces(step, steps, metrics)):
        line.append("  " * (index > 0) + label + " ", style="dim").append(value, style="bold" if index == 0 else "")
    Console(stderr=True, soft_wrap=True).print(line)


def duration(seconds: float) -> str:
    """Return seconds as "42s", "3m05s", "2h07m" or "4d03h"."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    for unit, below, name, minor in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // below:02d}{minor}"
    return f"{whole}s"


def _pieces(step: int, steps: int, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    done = step + 1
    pieces = [("step", f"{done:>{len(str(steps))}}/{steps}")]
    # With one step per rollout GRPO's loss is zero by construction: it would only confuse.
    hidden = {"train/loss"} if "reward/mean" in metrics else set()
    shown = [field for field in _FIELDS if field[1] in metrics and field[1] not in hidden]
    pieces += [(label, format(metrics[name], spec)) for label, name, spec in shown]
    if "perf/step_s" in metrics:
        seconds = metrics["perf/step_s"]
        pieces += [("time", f"{seconds:.2f}s"), ("left", duration(seconds * max(0, steps - done)))]
    return pieces
