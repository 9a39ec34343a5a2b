"""VLM-R1 jsonl and image folders to indexed WebDataset shards.

Same input, same bytes: members have a fixed time and owner, keys are running numbers, and shards are cut by size.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlmr1.data import index, rows
from megatron_vlmr1.data.index import Progress

REJECTED = "rejected.jsonl"
_TAR_BLOCK = 512
_OWNER = "vlmr1"

logger = logging.getLogger(__name__)


def build(
    jsonl_paths: Sequence[str | Path],
    image_roots: Sequence[str | Path],
    out: str | Path,
    shard_bytes: int,
    max_rejected_frac: float = 0.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the directory `out` of shards from jsonl files, each with the folder that its image paths start from.

    `out` appears complete or not at all. Beside shards and indexes it holds `shards.json` (their names) and
    `rejected.jsonl` (file, line and reason of each row left out).

    Args:
        jsonl_paths: files of VLM-R1 rows.
        image_roots: one folder for each file.
        out: must not exist yet.
        shard_bytes: a shard is closed before it would grow beyond this; a larger sample gets one of its own.
        max_rejected_frac: a larger share of bad rows is an error.
        progress: called with (bytes of jsonl read, bytes in all).

    Returns:
        ``{"out", "samples", "images", "shards", "bytes", "rejected"}``.

    Raises:
        ValueError: `out` exists, an input is missing or has no rows, or too many rows are bad.
    """
    out = Path(out)
    sources = _sources(jsonl_paths, image_roots)
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: exists already; delete it or choose another directory")
    work = out.parent / f".{out.name}.{secrets.token_hex(4)}.building"
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written there: {error.strerror}") from error
    try:
        tally = _write(sources, work, shard_bytes, progress)
        _judge(tally, jsonl_paths, max_rejected_frac)
        _write_text(work / index.MANIFEST, json.dumps({"shards": tally.shards}) + "\n")
        _write_text(work / REJECTED, "".join(json.dumps(row) + "\n" for row in tally.rejected))
        _sync_directory(work)
        os.rename(work, out)
        _sync_directory(out.parent)
    except BaseException:
        shutil.rmtree(work)
        raise
    if tally.own_methods:
        logger.warning(
            "%d rows name their %s, which counts only in a recipe with `accuracy`", tally.own_methods, rows.METHOD
        )
    return {
        "out": str(out),
        "samples": tally.samples,
        "images": tally.images,
        "shards": len(tally.shards),
        "bytes": tally.bytes,
        "rejected": len(tally.rejected),
    }


@dataclass
class _Tally:
    samples: int = 0
    images: int = 0
    bytes: int = 0
    own_methods: int = 0
    shards: list[str] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


class _ShardWriter:
    """Writes samples to numbered shards of limited size, each with its index; holds one shard in memory."""

    def __init__(self, directory: Path, shard_bytes: int, tally: _Tally) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.tally = tally
        self._samples: list[dict[str, Any]] = []
        self._size = 0

    def add(self, row: rows.Row, images: Sequence[tuple[bytes, str]]) -> None:
        record = {"question": row.question, "solution": row.solution, "extra": row.extra}
        sample: dict[str, Any] = {"__key__": f"{self.tally.samples:09d}"}
        sample["json"] = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
        for order, (data, suffix) in enumerate(images):
            sample[f"{order}.{suffix}"] = data
        size = sum(_TAR_BLOCK + _blocks(len(data)) for name, data in sample.items() if name != "__key__")
        if self._samples and self._size + size > self.shard_bytes:
            self.close()
        self._samples.append(sample)
        self._size += size
        self.tally.samples += 1
        self.tally.images += len(images)

    def close(self) -> None:
        """Write the shard in hand, if it holds anything."""
        if not self._samples:
            return
        from webdataset import TarWriter  # takes a second to import, and readers don't need it

        path = self.directory / f"shard-{len(self.tally.shards):06d}.tar"
        with path.open("wb") as file:
            with TarWriter(file, user=_OWNER, group=_OWNER, mtime=0, encoder=False) as tar:
                for sample in self._samples:
                    tar.write(sample)
            file.flush()
            os.fsync(file.fileno())
        index.write_index(index.scan(path), index.index_path(path))
        self.tally.shards.append(path.name)
        self.tally.bytes += path.stat().st_size
        self._samples, self._size = [], 0


def _sources(jsonl_paths: Sequence[str | Path], image_roots: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    if not jsonl_paths:
        raise ValueError("no jsonl file given: nothing to build from")
    if len(jsonl_paths) != len(image_roots):
        raise ValueError(f"{len(jsonl_paths)} jsonl files but {len(image_roots)} image folders: give one for each file")
    sources = [(Path(jsonl), Path(root)) for jsonl, root in zip(jsonl_paths, image_roots, strict=True)]
    for jsonl, root in sources:
        if not jsonl.is_file():
            raise ValueError(f"{jsonl}: no such jsonl file")
        if not root.is_dir():
            raise ValueError(f"{root}: no such image folder")
    return sources


def _write(sources: list[tuple[Path, Path]], work: Path, shard_bytes: int, progress: Progress | None) -> _Tally:
    tally = _Tally()
    writer = _ShardWriter(work, shard_bytes, tally)
    total = sum(jsonl.stat().st_size for jsonl, _ in sources)
    for path, number, line, root, done in _lines(sources):
        try:
            row = rows.parse(line)
            writer.add(row, [rows.load_image(root, name) for name in row.images])
            tally.own_methods += rows.METHOD in row.extra
        except rows.BadRow as error:
            tally.rejected.append({"file": str(path), "line": number, "reason": str(error)})
        if progress:
            progress(done, total)
    writer.close()
    return tally


def _lines(sources: list[tuple[Path, Path]]) -> Iterator[tuple[Path, int, bytes, Path, int]]:
    before = 0
    for path, root in sources:
        resolved = root.resolve()
        with path.open("rb") as file:
            for number, line in rows.lines(file):
                yield path, number, line, resolved, before + file.tell()
        before += path.stat().st_size


def _judge(tally: _Tally, jsonl_paths: Sequence[str | Path], max_rejected_frac: float) -> None:
    bad, total = len(tally.rejected), len(tally.rejected) + tally.samples
    if total == 0:
        raise ValueError(f"{', '.join(map(str, jsonl_paths))}: no rows")
    if bad > max_rejected_frac * total or bad == total:
        first = tally.rejected[0]
        enough = max(0.01, math.ceil(100 * bad / total) / 100)
        way_out = f"; --max-rejected {enough:.2f} would leave them out" if enough < 1 else ""
        raise ValueError(
            f"{first['file']}:{first['line']}: {first['reason']} (the first of {bad} bad rows in {total}{way_out})"
        )


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _blocks(size: int) -> int:
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK
