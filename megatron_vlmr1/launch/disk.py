"""Room and speed of a directory's disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_PIECE = 1 << 20


@dataclass(frozen=True)
class Disk:
    """What was found in a directory.

    Attributes:
        path: that was asked for.
        free_bytes: for this user.
        write_bytes_s: of a new file, flushed to the disk.
        problem: why it could not be written, in the system's words.
    """

    path: str
    free_bytes: int = 0
    write_bytes_s: float = 0.0
    problem: str = ""


def measure(path: Path, size_bytes: int) -> Disk:
    """Write a file of this size, flush it and remove it."""
    try:
        free = shutil.disk_usage(path).free
        # Never zeros: some file systems do not write them.
        piece = os.urandom(_PIECE)
        begun = time.perf_counter()
        with tempfile.TemporaryFile(dir=path, prefix=".vlmr1_", buffering=0) as file:
            for _ in range(max(1, size_bytes // _PIECE)):
                file.write(piece)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
    except OSError as error:
        return Disk(str(path), problem=error.strerror or str(error))
    return Disk(str(path), free, max(_PIECE, size_bytes) / seconds)


def existing_parent(path: Path) -> Path:
    """Return `path`, or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
