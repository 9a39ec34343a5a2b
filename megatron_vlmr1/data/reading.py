"""One sample, read by what an index says of it: where it lies, how long it is, and its checksums."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple, Protocol

from megatron_vlmr1.data import rows
from megatron_vlmr1.types import Damage, Sample

KINDS = ("json", "jpg", "png", "webp")


class Reference(NamedTuple):
    """All that is needed to read a sample in any process; plain values only."""

    place: str  # directory or URL of the shards
    shard: str  # file name of the tar
    digest: str  # of the shard's index
    key: str
    members: tuple[tuple[int, int, int, bytes], ...]  # offset, size, position in KINDS, sha256


class Opens(Protocol):
    """What brings shards from elsewhere."""

    def open(self, place: str, shard: str, digest: str) -> int:
        """Return a descriptor of the shard's local copy, for the caller to close.

        Raises:
            ValueError: it cannot be had; says why.
        """


def is_url(place: str | Path) -> bool:
    """Return whether shards are asked for by URL: ``scheme://…``, or a command."""
    return "://" in str(place) or str(place).startswith("pipe:")


def read(reference: Reference, remote: Opens | None = None) -> Sample | Damage:
    """Return the sample, or why it is lost; never raises for what lies on the disk or comes from a server.

    Args:
        reference: where it lies.
        remote: brings the shard where its place is a URL.
    """
    place, shard, digest, key, members = reference
    try:
        if is_url(place):
            assert remote is not None
            fd = remote.open(place, shard, digest)
        else:
            fd = os.open(Path(place) / shard, os.O_RDONLY | os.O_NONBLOCK)  # not to wait for a pipe's writer
        try:
            text, *images = [_member(fd, *member) for member in members]
        finally:
            os.close(fd)
        return _sample(key, text, tuple(images))
    except FileNotFoundError:
        return Damage(shard, key, "the shard is missing")
    except OSError as error:
        return Damage(shard, key, f"the shard cannot be read: {error.strerror}")
    except ValueError as error:
        return Damage(shard, key, str(error))


def _member(fd: int, offset: int, size: int, kind: int, sha256: bytes) -> bytes:
    what = f"{KINDS[kind]} member at byte {offset}"
    if offset + size > os.fstat(fd).st_size:  # before reading: pread would allocate what a hostile index claims
        raise ValueError(f"{what} lies beyond the end of the shard")
    data = os.pread(fd, size, offset)
    if hashlib.sha256(data).digest() != sha256:
        raise ValueError(f"{what} does not match its checksum")
    return data


def _sample(key: str, text: bytes, images: tuple[bytes, ...]) -> Sample:
    """Read a json member: one of ours, or of a shard made elsewhere, which may be any row that `rows` knows."""
    try:
        record = json.loads(text)
        if isinstance(record, dict) and not record.keys() >= {"question", "solution", "extra"}:
            row = rows.from_object(record)
            return Sample(key, row.question, row.solution, images, row.extra)
        question, solution, extra = record["question"], record["solution"], record["extra"]
    except (KeyError, TypeError, RecursionError, rows.BadRow) as error:
        raise ValueError(f"the json member is not a sample: {error}") from error
    if not (isinstance(question, str) and isinstance(solution, str) and isinstance(extra, dict)):
        raise ValueError("the json member is not a sample: question, solution or extra has a wrong type")
    return Sample(key, question, solution, images, extra)
