"""Files that grow line by line, whatever happens to the disk."""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from contextlib import suppress
from io import FileIO
from pathlib import Path

log = logging.getLogger(__name__)

_MAX_WAITING = 1000  # lines, of a few KB each


class LineFile:
    """Appends whole lines. What a failing disk refuses waits in memory, up to a limit, and is written once it can be.

    A failure is logged once, and once more when it is over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._failing = False

    @property
    def unwritten(self) -> int:
        """Lines that are not in the file: those that wait, and those that were dropped because too many waited."""
        return len(self._waiting) + self._dropped

    def append(self, line: bytes) -> None:
        """Add a line, which ends in a newline, after those that wait."""
        if len(self._waiting) == _MAX_WAITING:
            self._waiting.popleft()
            self._dropped += 1
        self._waiting.append(line)
        self.flush()

    def flush(self) -> None:
        """Try to write what waits."""
        try:
            while self._waiting:
                append_whole(self.path, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                log.error("%s is not written, and the run goes on without: %s", self.path, error)
            self._failing = True
            return
        if self._failing:
            log.warning("%s is written again; %d lines were lost", self.path, self._dropped)
        self._failing = False


def append_whole(path: Path, data: bytes) -> None:
    """Append lines, or nothing; begins a new line behind one that a killed writer has left torn.

    Raises:
        OSError: the disk is full or fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Reopened each time: a file that was rotated or a disk that came back is found again.
    with path.open("a+b", buffering=0) as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read(1) != b"\n":
                data = b"\n" + data
        write_whole(file, data)


def write_whole(file: FileIO, data: bytes) -> None:
    """Write `data` at the end of an unbuffered file, or leave that as long as it was.

    Raises:
        OSError: the disk is full or fails.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise
