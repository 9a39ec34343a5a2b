"""A safetensors file written piece by piece: memory for one piece, and its name only when its bytes are proven."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


def row_ranges(entry: Entry, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor's first dimension into ranges of at most so many bytes (or one row)."""
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, nbytes * rows // max(1, entry.nbytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def header(entries: Sequence[Entry]) -> bytes:
    """Return what stands before the data: its own length (8 bytes, little-endian) and JSON, padded to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        place = [offset, offset := offset + entry.nbytes]
        table[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    path: Path,
    entries: Sequence[Entry],
    pieces: Callable[[Entry], Iterable[torch.Tensor]],
    progress: Callable[[int], None],
) -> None:
    """Write a file, flush it, read it back, and give it its name only if its bytes are the ones that were meant.

    Args:
        path: of the finished file.
        entries: its tensors, in order.
        pieces: an entry's values, cut along its first dimension, in the entry's type.
        progress: told again and again how many bytes of data have been written.

    Raises:
        OSError: the disk failed, or gave back other bytes; there is no file of that name.
    """
    temporary = path.with_name(path.name + ".partial")
    head = header(entries)
    meant = hashlib.sha256(head)
    done = 0
    with temporary.open("wb") as out:
        out.write(head)
        for data in _blocks(entries, pieces):
            out.write(data)
            meant.update(data)
            progress(done := done + len(data))
        out.flush()
        os.fsync(out.fileno())
    if _sha256(temporary) != meant.digest():
        raise OSError(f"{temporary}: the disk gave back other bytes than were written")
    temporary.rename(path)


def _blocks(entries: Sequence[Entry], pieces: Callable[[Entry], Iterable[torch.Tensor]]) -> Iterator[memoryview]:
    for entry in entries:
        written = 0
        for piece in pieces(entry):
            assert piece.dtype == entry.dtype, (entry, piece.dtype)
            data = piece.contiguous().view(-1).view(torch.uint8).numpy().data
            written += len(data)
            yield data
        assert written == entry.nbytes, (entry, written)


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        block = memoryview(bytearray(_READ_BYTES))
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.digest()
