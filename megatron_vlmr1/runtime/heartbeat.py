"""One small file for each rank of an attempt, which says where it is and that it lives."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

_BYTES = 2048  # every record is padded to this, so that a shorter one needs no truncation
_LONGEST = {"phase": 60, "at": 300, "error": 600, "host": 100}  # characters; JSON escapes a few of them


@dataclass(frozen=True)
class Heartbeat:
    """A rank's state as it wrote it.

    Attributes:
        beat: grows with every record: who compares two of them needs no clock that others share.
        step: steps done; None until training starts.
        resumed: steps done when training started.
        phases: phases entered and left, the same on all ranks at the same place of the run.
        phase_s: seconds since the phase began.
        still_s: seconds without any progress.
        at: the line of Python that runs, libraries left out.
        waits: whether it is in a collective.
        asked: the signal that asked it to stop, if one did.
        left: the rank has ended by itself; with `error` if by an exception.
    """

    rank: int
    host: str
    pid: int
    beat: int = 0
    step: int | None = None
    resumed: int = 0
    phase: str = "start"
    phases: int = 0
    phase_s: float = 0.0
    still_s: float = 0.0
    at: str = ""
    waits: bool = False
    asked: str = ""
    left: bool = False
    error: str = ""


def path(log_dir: Path, rank: int) -> Path:
    """Return the file of `rank`."""
    return log_dir / "heartbeat" / f"rank_{rank}.json"


def write(log_dir: Path, record: Heartbeat) -> None:
    """Write a rank's record over its last one.

    In place and always as long: so it works on a full disk, and costs a parallel file system neither a new file nor a
    rename. A reader may see half of two records, which is no JSON and passes.

    Raises:
        OSError: the first record found no room, or the file system fails.
    """
    file = path(log_dir, record.rank)
    row = asdict(record)
    for name, longest in _LONGEST.items():
        row[name] = " ".join(row[name].split())[:longest]
    data = json.dumps(row).encode("ascii")[: _BYTES - 1].ljust(_BYTES - 1) + b"\n"
    try:
        handle = os.open(file, os.O_WRONLY)
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        if os.pwrite(handle, data, 0) != len(data):
            raise OSError(f"{file}: no room")
    finally:
        os.close(handle)  # not kept open: closing is what shows it to other nodes on NFS


def read(log_dir: Path, rank: int) -> Heartbeat | None:
    """Return a rank's last record; None where there is none, or it is just being written."""
    try:
        row = json.loads(path(log_dir, rank).read_bytes())
    except (OSError, ValueError):
        return None
    known = {field.name for field in fields(Heartbeat)}
    try:
        return Heartbeat(**{key: value for key, value in row.items() if key in known})
    except (TypeError, AttributeError):
        return None


def read_all(log_dir: Path) -> list[Heartbeat]:
    """Return the records of all ranks of an attempt that wrote one, in their order."""
    names = (file.stem.removeprefix("rank_") for file in (log_dir / "heartbeat").glob("rank_*.json"))
    found = (read(log_dir, rank) for rank in sorted(int(name) for name in names if name.isdecimal()))
    return [record for record in found if record is not None]
