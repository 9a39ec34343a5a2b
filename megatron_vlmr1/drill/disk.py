"""The rows about disks that fail while a checkpoint is saved."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_vlmr1.drill.faults import Fault
from megatron_vlmr1.drill.field import RANKS, Field
from megatron_vlmr1.drill.jobs import need, run
from megatron_vlmr1.errors import STOPPED
from megatron_vlmr1.telemetry.metrics import read_metrics

_BAD = (1, 2, 4, 5, 6)  # the saves that fail, of those after each step; three in a row at the end
_GOOD = 3
_TOLD = [0, 1, 2, 0, 1, 2]  # failures in a row, as the metrics of each step say; the next one ends the run
_ROOM = "64m"  # for a few checkpoints of 19 MB; 8 and 24 MB have room for none, and for no second one


def full(field: Field) -> str:
    """A file system of 8 MB, which is given room and loses it again."""
    with mounted(field.root / "full" / "checkpoints", "8m") as directory:
        if directory is None:
            return _injected(field, "full", "save-file", "ENOSPC")
        turns = {3: f"remount:size={_ROOM}@{directory}", 4: f"remount:size=24m@{directory}"}
        return f"tmpfs of 8 MB: {_survive(field, 'full', [Fault(0, step, 'save', a) for step, a in turns.items()])}"


def read_only(field: Field) -> str:
    """A directory that cannot be written for a while."""
    with mounted(field.root / "read_only" / "checkpoints", _ROOM) as directory:
        if directory is None and os.geteuid() == 0:  # whom no mode stops
            return _injected(field, "read_only", "save-file", "EROFS")
        closed, opened = ("chmod:555", "chmod:755") if directory is None else ("remount:ro", "remount:rw")
        place = field.root / "read_only" / "checkpoints"
        turns = {1: closed, 3: opened, 4: closed}
        faults = [Fault(0, step, "save", f"{action}@{place}") for step, action in turns.items()]
        return f"{closed.partition(':')[0]}: {_survive(field, 'read_only', faults)}"


def input_output_error(field: Field) -> str:
    """EIO from fsync on the first rank, and from the second rank's own file."""
    faults = [Fault(0, step, "fsync", "oserror:EIO") for step in _BAD[:3]]
    faults += [Fault(1, step, "save-file", "oserror:EIO") for step in _BAD[3:]]
    return f"injected: {_survive(field, 'eio', faults)}"


def _injected(field: Field, name: str, point: str, error: str) -> str:
    faults = [Fault(0, step, point, f"oserror:{error}") for step in _BAD]
    return f"injected {error}, as nothing may be mounted here: {_survive(field, name, faults)}"


def _survive(field: Field, name: str, faults: Sequence[Fault]) -> str:
    ended = run(field.config(name, train={"steps": 20, "save_every": 1, "async_save": False}), RANKS, faults).expect(
        STOPPED
    )
    run_dir = field.root / name
    for step in (*_BAD, _GOOD):
        said = f"checkpoint of step {step} failed" in ended.output
        need(said == (step in _BAD), f"the save of step {step} {'failed' if said else 'did not fail'}")
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if not path.is_symlink())
    need(left == [f"step_{_GOOD}"], f"left are {left} instead of step_{_GOOD}")
    rows = read_metrics(run_dir)
    done = [step for step, _ in rows]
    need(done == list(range(_BAD[-1])), f"steps {done} were trained")
    told = [int(row["checkpoint/save_failures"]) for _, row in rows]
    need(told == _TOLD, f"checkpoint/save_failures is {told} instead of {_TOLD}")
    return f"{len(_BAD)} saves failed, nothing of them left, step {_GOOD} saved; three in a row: exit {STOPPED}"


@contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path | None]:
    """Put a file system in memory at `directory`, made if missing; yield None where that is not permitted."""
    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - a list, of our own
    except FileNotFoundError:
        done = None
    if done is None or done.returncode:
        yield None
        return
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)  # noqa: S603, S607
