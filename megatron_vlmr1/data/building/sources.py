"""What shards are built from: files of rows, cut into pieces that processes read apart from each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_vlmr1.data import rows
from megatron_vlmr1.data.rows import BadRow, Row

PIECE_BYTES = 1 << 18
Kind = Literal["jsonl", "coco", "refcoco", "parquet"]


@dataclass(frozen=True)
class Source:
    """One file of rows, or one directory of parquet files, and how it is read."""

    kind: Kind
    path: Path
    images: Path  # folder that image paths start from
    method: str | None = None  # reward of the rows that name none themselves
    question: str | None = None  # text with {classes} (coco) or {expression} (refcoco)
    classes: Literal["all", "present"] = "all"  # coco: which ones a question names
    box_format: Literal["xyxy", "xywh"] = "xyxy"  # refcoco: of boxes that don't say

    def check(self) -> None:
        """Refuse what is not there.

        Raises:
            ValueError: no such file or folder.
        """
        if self.kind == "parquet" and not self.path.is_dir():
            raise ValueError(f"{self.path}: no such directory of parquet files")
        if self.kind != "parquet" and not self.path.is_file():
            raise ValueError(f"{self.path}: no such {self.kind if self.kind == 'jsonl' else 'json'} file")
        if not self.images.is_dir():
            raise ValueError(f"{self.images}: no such image folder")

    def files(self) -> list[Path]:
        """Return the files that hold the rows."""
        return sorted(self.path.rglob("*.parquet")) if self.kind == "parquet" else [self.path]

    def identity(self) -> dict[str, Any]:
        """Return what is equal only while it is the same source, read in the same way: names, sizes, times."""
        stats = [(str(path.resolve()), path.stat()) for path in self.files()]
        found = {"files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]}
        return {**asdict(self), "path": str(self.path), "images": str(self.images.resolve()), **found}


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of a file.

    `start` and `end` are bytes of a jsonl file, or of one that lists the rows of a json document (`listed`);
    of a parquet file `start` is the row group.
    """

    source: Source
    path: Path
    start: int
    end: int
    size_bytes: int
    listed: bool = False

    @property
    def file(self) -> str:
        """What a person calls the file."""
        return str(self.source.path if self.listed else self.path)


class Item(NamedTuple):
    """One row of a piece."""

    place: int  # where `read` finds it again: the byte where its line begins, or its number in the row group
    line: int  # from 1 within the piece; of a json document the number of the entry within the document
    row: Row | BadRow | None  # None: a blank line


def pieces(source: Source, place: Path) -> list[Piece]:
    """Cut a source; the rows of a json document are first listed in the file `place`, unless that is there already.

    Raises:
        ValueError: the file is not what it should be.
    """
    if source.kind == "parquet":
        from megatron_vlmr1.data.building import parquet

        return [
            Piece(source, path, group, group + 1, size)
            for path in source.files()
            for group, size in enumerate(parquet.group_sizes(path))
        ]
    if source.kind == "jsonl":
        return _cut(source, source.path, listed=False)
    if not place.exists():
        _list(source, place)
    return _cut(source, place, listed=True)


def read(piece: Piece, places: Sequence[int] | None = None) -> Iterator[Item]:
    """Yield the rows of a piece, or of those at `places` (ascending) only.

    Raises:
        ValueError: a parquet file is damaged.
    """
    if piece.source.kind == "parquet":
        from megatron_vlmr1.data.building import parquet

        for at, row in parquet.rows(piece.path, piece.start, places):
            yield Item(at, at + 1, _parsed(row))
        return
    with piece.path.open("rb") as file:
        if places is None:
            found = rows.lines(file, piece.start, piece.end)
        else:
            found = (next(rows.lines(file, place), (place, b"")) for place in places)
        for number, (place, line) in enumerate(found, start=1):
            if not line.strip():
                yield Item(place, number, None)
            elif piece.listed:
                yield _listed_item(place, line)
            else:
                yield Item(place, number, _parsed(line))


def _parsed(data: bytes | dict[str, Any]) -> Row | BadRow:
    try:
        return rows.parse(data) if isinstance(data, bytes) else rows.from_object(data)
    except BadRow as error:
        return error


def _listed_item(place: int, line: bytes) -> Item:
    entry = json.loads(line)
    found = entry["row"]
    return Item(place, entry["entry"], BadRow(found) if isinstance(found, str) else _parsed(found))


def _cut(source: Source, path: Path, listed: bool) -> list[Piece]:
    size = path.stat().st_size
    cuts = [0]
    with path.open("rb") as file:
        for about in range(PIECE_BYTES, size, PIECE_BYTES):
            if about <= cuts[-1]:
                continue
            file.seek(about - 1)
            rows.skip_line(file, file.readline(rows.MAX_LINE_BYTES + 1))
            if (at := file.tell()) < size:
                cuts.append(at)
    return [Piece(source, path, a, b, b - a, listed) for a, b in zip(cuts, [*cuts[1:], size], strict=True)]


def _list(source: Source, place: Path) -> None:
    from megatron_vlmr1.data.building import coco, refcoco

    try:
        document = json.loads(source.path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source.path}: not JSON: {error}") from error
    if source.kind == "coco":
        listing = coco.rows(document, source.path, source.question, source.classes == "present")
    else:
        listing = refcoco.rows(document, source.path, source.question, source.box_format)
    with place.open("w", encoding="utf-8") as file:
        for entry, row in listing:
            file.write(json.dumps({"entry": entry, "row": row}) + "\n")
