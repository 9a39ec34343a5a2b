"""A file that is flushed and read back from the disk while it is still being written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_SEGMENT_BYTES = 1 << 28
_READ_BYTES = 1 << 20  # memory of larger ones is taken from the system anew each time


class ProvenFile:
    """Takes bytes; a thread flushes what has come so far, segment by segment, and compares what the disk says."""

    def __init__(self, file: IO[bytes], prover: ThreadPoolExecutor, hasher: ThreadPoolExecutor) -> None:
        """Begin at the start of an empty file, with two threads to work in."""
        self.name = file.name
        self._file, self._prover, self._hasher = file, prover, hasher
        self._start = self._end = 0  # of the segment that is being written
        self._digest = hashlib.sha256()
        self._proofs: list[Future[None]] = []

    def write(self, data: memoryview | bytes) -> int:
        """Write all of some bytes, which stay as they are until it returns.

        Raises:
            OSError: the disk failed, or gave back other bytes of an earlier segment.
        """
        hashing = self._hasher.submit(self._digest.update, data)
        try:
            size = self._file.write(data)
        finally:
            hashing.result()
        self._end += size
        if self._end - self._start >= _SEGMENT_BYTES:
            self._prove()
        return size

    def flush(self) -> None:
        """Do nothing: bytes are flushed by segments. Whoever takes this for a file may call it."""

    def tell(self) -> int:
        """Return how many bytes have been written."""
        return self._end

    def finish(self) -> None:
        """Wait until every byte is on the disk and proven.

        Raises:
            OSError: the disk failed, or gave back other bytes than were written.
        """
        self._prove()
        while self._proofs:
            self._proofs.pop(0).result()
        os.fsync(self._file.fileno())
        if os.fstat(self._file.fileno()).st_size != self._end:
            raise OSError(f"{self.name}: the disk gave back other bytes than were written")

    def _prove(self) -> None:
        self._file.flush()
        self._proofs.append(self._prover.submit(self._compare, self._start, self._end, self._digest.digest()))
        self._start, self._digest = self._end, hashlib.sha256()
        while len(self._proofs) > 2:  # or a slow disk would be a few segments behind, then all of them
            self._proofs.pop(0).result()

    def _compare(self, start: int, stop: int, meant: bytes) -> None:
        fd = self._file.fileno()
        os.fdatasync(fd)
        os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        digest = hashlib.sha256()
        for offset in range(start, stop, _READ_BYTES):
            digest.update(os.pread(fd, min(_READ_BYTES, stop - offset), offset))
        if digest.digest() != meant:
            raise OSError(f"{self.name}: the disk gave back other bytes than were written")


@contextmanager
def proven(path: Path) -> Iterator[ProvenFile]:
    """Write ``PATH.partial``, which gets its name at the end of the block if its bytes are the ones that were meant.

    Raises:
        OSError: the disk failed, or gave back other bytes; there is no file of that name.
    """
    temporary = path.with_name(path.name + ".partial")
    with ThreadPoolExecutor(1) as prover, ThreadPoolExecutor(1) as hasher, temporary.open("w+b") as file:
        out = ProvenFile(file, prover, hasher)
        yield out
        out.finish()
    temporary.rename(path)
