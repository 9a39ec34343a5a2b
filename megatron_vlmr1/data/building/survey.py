"""The first pass: every row is checked and measured, and what goes into which shard is fixed.

Images are opened as far as their headers; nothing is copied. What it finds is kept on disk, so that an interrupted
build does not begin with it again.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmr1.data import boxes, rows
from megatron_vlmr1.data.building import pool, sources
from megatron_vlmr1.data.building.sources import Piece
from megatron_vlmr1.data.rows import METHOD, BadRow, Row

TAR_BLOCK = 512
_Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Shard:
    """What goes into one shard."""

    number: int
    first: int  # number of its first sample over all shards
    parts: tuple[tuple[Piece, list[int], list[int], list[int]], ...]  # piece, places, lines, sizes in the tar

    @property
    def name(self) -> str:
        """File name of its tar."""
        return f"shard-{self.number:06d}.tar"

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        return sum(len(places) for _, places, _, _ in self.parts)

    @property
    def size_bytes(self) -> int:
        """Bytes of its members, headers and padding included."""
        return sum(sum(sizes) for _, _, _, sizes in self.parts)


@dataclass(frozen=True, eq=False)
class Survey:
    """Good rows in order, and the bad ones."""

    table: _Numbers  # [samples, 4]: number of the piece, place in it, line in the file, bytes in the tar
    rejected: list[dict[str, Any]]  # file, line, reason
    images: int
    own_methods: int  # rows that name a reward, their own or their source's

    def __len__(self) -> int:
        return len(self.table)

    def shards(self, pieces: Sequence[Piece], shard_bytes: int) -> list[Shard]:
        """Cut the samples into shards of at most `shard_bytes`; a larger sample gets one of its own."""
        cuts, size = [0], 0
        for i, more in enumerate(self.table[:, 3].tolist()):
            if size and size + more > shard_bytes:
                cuts.append(i)
                size = 0
            size += more
        ends = [*cuts[1:], len(self)]
        return [Shard(n, a, _parts(self.table[a:b], pieces)) for n, (a, b) in enumerate(zip(cuts, ends, strict=True))]

    def save(self, path: Path) -> None:
        """Write to `path`: whole or not at all."""
        rest = json.dumps([self.rejected, self.images, self.own_methods]).encode()
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, table=self.table, rest=np.frombuffer(rest, np.uint8))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Survey | None:
        """Read what `save` wrote; None where there is none or it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as found:
                return cls(found["table"], *json.loads(found["rest"].tobytes()))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


@dataclass(frozen=True)
class _Found:
    lines: int
    rows: list[tuple[int, int, int]]  # place, line, bytes in the tar
    rejected: list[tuple[int, str]]
    images: int
    own_methods: int


def survey(pieces: Sequence[Piece], workers: int, progress: Callable[[int, int], None]) -> Survey:
    """Look at every row.

    Args:
        pieces: all pieces, those of a file one after the other.
        workers: processes.
        progress: called with (bytes of source files done, bytes in all).

    Raises:
        ValueError: a source is damaged.
    """
    total, done = sum(piece.size_bytes for piece in pieces), 0
    table: list[_Numbers] = []
    rejected: list[dict[str, Any]] = []
    images = own_methods = before = 0
    last = ""
    for number, (piece, found) in enumerate(zip(pieces, pool.each(_look, pieces, workers), strict=True)):
        if piece.listed or piece.file != last:
            before = 0
        last = piece.file
        places = np.array(found.rows, np.uint64).reshape(-1, 3) + np.array([0, before, 0], np.uint64)
        table.append(np.insert(places, 0, number, axis=1))
        rejected += [{"file": piece.file, "line": before + line, "reason": text} for line, text in found.rejected]
        images, own_methods = images + found.images, own_methods + found.own_methods
        before += found.lines
        done += piece.size_bytes
        progress(done, total)
    return Survey(np.concatenate([np.zeros((0, 4), np.uint64), *table]), rejected, images, own_methods)


def finished(row: Row | BadRow, method: str | None) -> Row:
    """Return the row with its source's reward, where it names none itself.

    Raises:
        BadRow: it is one.
    """
    if isinstance(row, BadRow):
        raise row
    return row if method is None else replace(row, extra={METHOD: method, **row.extra})


def record(row: Row) -> bytes:
    """Return a sample's json member."""
    fields = {"question": row.question, "solution": row.solution, "extra": row.extra}
    return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()


def tar_bytes(sizes: Sequence[int]) -> int:
    """Return what members of these sizes take in a tar."""
    return sum(TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK for size in sizes)


def _look(piece: Piece) -> _Found:
    root = piece.source.images.resolve()
    good: list[tuple[int, int, int]] = []
    rejected = []
    lines = images = own_methods = 0
    for item in sources.read(piece):
        lines = item.line
        if item.row is None:
            continue
        try:
            row = finished(item.row, piece.source.method)
            looks = [rows.look(root, image) for image in row.images]
            boxes.check(row, [(look.width, look.height) for look in looks])
        except BadRow as error:
            rejected.append((item.line, str(error)))
            continue
        size = tar_bytes([len(record(row)), *(look.size_bytes for look in looks)])
        good.append((item.place, item.line, size))
        images += len(looks)
        own_methods += METHOD in row.extra
    return _Found(lines, good, rejected, images, own_methods)


def _parts(table: _Numbers, pieces: Sequence[Piece]) -> tuple[tuple[Piece, list[int], list[int], list[int]], ...]:
    cuts = [0, *(np.flatnonzero(np.diff(table[:, 0].astype(np.int64))) + 1).tolist(), len(table)]
    spans = [table[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return tuple((pieces[int(s[0, 0])], s[:, 1].tolist(), s[:, 2].tolist(), s[:, 3].tolist()) for s in spans)
