"""The attempts of a run: how each ended, and whether the same step keeps failing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlmr1 import errors
from megatron_vlmr1.runtime import heartbeat
from megatron_vlmr1.telemetry.files import json_line, write_or_warn

OUTCOME = "outcome.json"
RETRY = "retry"  # a file in an attempt that was started with --retry: what failed before it is forgotten
FAILURES = 3  # crashes of the same step in a row, after which a run is not started again
_MEANT = {errors.DONE, errors.BAD_INPUT, errors.STOPPED, errors.REQUEUE, 130, 143}  # ends that are no crash


@dataclass(frozen=True)
class Crash:
    """An attempt that ended without meaning to."""

    name: str
    step: int
    resumed: int
    words: str


def write_outcome(log_dir: Path, reason: str, code: int, step: int | None) -> None:
    """Say how the attempt ended, for the launcher or the batch script; a full disk is only warned of."""
    write_or_warn(log_dir / OUTCOME, json_line({"reason": " ".join(reason.split()), "code": code, "step": step}))


def read_outcome(log_dir: Path) -> dict[str, Any] | None:
    """Return what `write_outcome` wrote, None where nothing is.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be read.
    """
    try:
        outcome = json.loads((log_dir / OUTCOME).read_bytes())
        if not isinstance(outcome, dict) or not 0 <= int(outcome["code"]) < 256:
            raise ValueError("no outcome")
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise ValueError(f"no outcome: {error!r}") from error
    return outcome


def newest(run_dir: Path) -> Path | None:
    """Return the directory of a run's newest attempt, None before the first one."""
    attempts = [path for path in (run_dir / "logs").glob("attempt_*") if path.name.removeprefix("attempt_").isdecimal()]
    return max(attempts, key=number, default=None)


def crash_loop(log_dir: Path) -> str:
    """Return why the attempt of `log_dir` had better not start: nothing, or that the same step failed three times.

    The attempts before it count if they crashed at one step in a row, none of them started from a newer checkpoint
    than the one before. One that ended as it meant to (done, requeue, stopped, by hand) ends the row, and so does one
    all of whose ranks had been asked to stop (scancel or preemption, whose patience was shorter than the step), or that
    was started to try again. One that never came to its first step, or was refused, says nothing.
    """
    row: list[Crash] = []
    for before in range(number(log_dir) - 1, -1, -1):
        attempt = log_dir.with_name(f"attempt_{before}")
        records = heartbeat.read_all(attempt)
        steps = [record.step for record in records if record.step is not None]
        if steps:
            if _meant(attempt) or all(record.asked for record in records):
                break
            crash = Crash(attempt.name, max(steps), records[0].resumed, _words(attempt, records))
            later = [after.resumed for after in row]  # a checkpoint that one of these made lets the next start later
            if row and (crash.step != row[0].step or len(set(later)) > 1):
                break
            row.append(crash)
        if len(row) == FAILURES or (attempt / RETRY).exists():
            break
    if len(row) < FAILURES:
        return ""
    told = "; ".join(f"{crash.name}: {crash.words}" for crash in reversed(row))
    return (
        f"step {row[0].step + 1} failed {FAILURES} times in a row ({told}); mend what is wrong there, then start once "
        "with --retry"
    )


def number(log_dir: Path) -> int:
    """Return the K of ``attempt_K``; 0 for a directory of another name."""
    name = log_dir.name.removeprefix("attempt_")
    return int(name) if name.isdecimal() else 0


def _meant(attempt: Path) -> bool:
    try:
        outcome = read_outcome(attempt)
    except (OSError, ValueError):
        return False
    return outcome is not None and int(outcome["code"]) in _MEANT


def _words(attempt: Path, records: list[heartbeat.Heartbeat]) -> str:
    """What an attempt said last: its outcome, its ranks' exceptions, or which of them were killed and where."""
    try:
        outcome = read_outcome(attempt)
    except (OSError, ValueError):
        outcome = None
    if outcome is not None:
        return str(outcome["reason"])[:300]
    killed = [record for record in records if not record.left]
    said = [f"rank {record.rank}: {record.error}" for record in records if record.error]
    if killed and len(killed) < len(records) or not said:
        said.insert(0, ", ".join(f"rank {r.rank} was killed in phase {r.phase!r}" for r in killed[:3]))
    return "; ".join(said[:2])[:300]
