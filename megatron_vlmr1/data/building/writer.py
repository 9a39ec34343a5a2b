"""The second pass: one shard and its index."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_vlmr1.data import index, rows
from megatron_vlmr1.data.building import sources
from megatron_vlmr1.data.building.survey import Shard, finished, record, tar_bytes
from megatron_vlmr1.data.rows import BadRow
from megatron_vlmr1.data.scan import scan

_OWNER = "vlmr1"


class SourceChanged(ValueError):
    """A row is no longer what it was when the build looked at it."""


def write(job: tuple[Path, Path, Shard]) -> int:
    """Write shard (directory, directory for unfinished files, shard) unless it is there; return the bytes of its tar.

    It gets its name when it is whole. Same input, same bytes: members have a fixed time and owner, and keys are the
    samples' running numbers.

    Raises:
        SourceChanged: a row or an image is not what the survey saw.
    """
    directory, place, shard = job
    path = directory / shard.name
    if _is_done(path, shard):
        return path.stat().st_size
    from webdataset import TarWriter  # brings torch: seconds, and only here is it needed

    unfinished = place / f"{os.getpid()}-{path.name}"
    with unfinished.open("wb") as file:
        with TarWriter(file, user=_OWNER, group=_OWNER, mtime=0, encoder=False) as tar:
            for sample in _samples(shard):
                tar.write(sample)
        file.flush()
        os.fsync(file.fileno())
    found = scan(unfinished)
    assert len(found.index) == shard.samples and not found.ignored and not found.damage, path
    beside = unfinished.with_suffix(".index")
    index.write_index(found.named(path.name), beside)
    os.replace(unfinished, path)
    os.replace(beside, index.index_path(path))
    return path.stat().st_size


def _is_done(path: Path, shard: Shard) -> bool:
    try:
        return (
            len(index.read_index(index.index_path(path))) == shard.samples and path.stat().st_size >= shard.size_bytes
        )
    except (ValueError, OSError):
        return False


def _samples(shard: Shard) -> Iterator[dict[str, str | bytes]]:
    number = shard.first
    for piece, places, lines, sizes in shard.parts:
        root = piece.source.images.resolve()
        for item, line, size in zip(sources.read(piece, places), lines, sizes, strict=True):
            sample: dict[str, str | bytes] = {"__key__": f"{number:09d}"}
            try:
                row = finished(item.row or BadRow("the line is blank"), piece.source.method)
                images = [rows.load_image(root, image) for image in row.images]
            except BadRow as error:
                raise SourceChanged(f"{piece.file}:{line}: changed while shards were built: {error}") from error
            sample["json"] = record(row)
            sample |= {f"{order}.{suffix}": data for order, (data, suffix) in enumerate(images)}
            if tar_bytes([len(data) for key, data in sample.items() if key != "__key__"]) != size:
                raise SourceChanged(f"{piece.file}:{line}: changed while shards were built")
            yield sample
            number += 1
