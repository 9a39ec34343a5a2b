"""A safetensors file written piece by piece: memory for one piece, and its name only when its bytes are proven."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from megatron_vlmr1.checkpoint.proven import proven

T = TypeVar("T")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    """Write a file, read it back from the disk, and give it its name only if its bytes are the ones that were meant.

    Args:
        path: of the finished file.
        entries: its tensors, in order.
        pieces: an entry's values, cut along its first dimension, in the entry's type.
        progress: told again and again how many bytes of data have been written.

    Raises:
        OSError: the disk failed, or gave back other bytes; there is no file of that name.
    """
    head = header(entries)
    with proven(path) as out:
        for data in chain([memoryview(head)], ahead(_blocks(entries, pieces))):
            out.write(data)
            progress(out.tell() - len(head))


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield items, each made by a thread while the one before it is in use."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, source, end)
            yield item  # type: ignore[misc]


def as_bytes(values: torch.Tensor) -> memoryview:
    """Return a tensor's numbers as bytes, row by row."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def data_offset(path: Path) -> dict[str, int]:
    """Return where each tensor's data begins in a file, whose header is known to be sound."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(size))
    return {name: 8 + size + place["data_offsets"][0] for name, place in table.items() if name != "__metadata__"}


def read(path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Read numbers from a file.

    Not through a mapping: that would count as this process's memory, and wait for the disk page by page.

    Raises:
        OSError: the file ends too early, or the disk failed.
    """
    out = torch.empty(tuple(shape), dtype=dtype)
    left = as_bytes(out)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left and (size := file.readinto(left)):
            left = left[size:]
    if left:
        raise OSError(f"{path}: {len(left)} bytes are missing at its end")
    return out


def _blocks(entries: Sequence[Entry], pieces: Callable[[Entry], Iterable[torch.Tensor]]) -> Iterator[memoryview]:
    for entry in entries:
        written = 0
        for piece in pieces(entry):
            assert piece.dtype == entry.dtype, (entry, piece.dtype)
            written += len(data := as_bytes(piece))
            yield data
        assert written == entry.nbytes, (entry, written)
