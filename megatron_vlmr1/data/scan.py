"""What members a tar holds, whoever wrote it: samples, what is no part of one, and where it is damaged.

A sample is ``KEY.json`` with its images ``KEY.jpg`` or ``KEY.0.jpg``, ``KEY.1.png`` … (jpg, jpeg, png, webp, in any
case); KEY may have folders, and ends at the first dot of the file name. Nothing is unpacked: names are only keys.
Links, absolute names, names with ``..`` and members of other kinds (``.cls``, ``.pkl``, ``.txt``) are left alone and
counted.

A damaged header hides its member, and tar readers then skip it or stop. Here the bytes between two members that belong
to none are a gap, and the samples on both sides of one are kept in the index as damaged: they may lack something.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from megatron_vlmr1.data.index import KINDS, ShardIndex

logger = logging.getLogger(__name__)

_BLOCK = 512
_CHUNK = 1 << 20
_MEMBER_BYTES = 1 << 42  # no member is as large; file systems refuse to seek much further
_EXTENDED_BYTES = 1 << 14  # of a header that extends another: tarfile takes the square of it in time
_MEMBER = re.compile(
    r"(?P<key>(?:[^/]+/)*[^/.]+)\.(?:(?P<json>json)|(?:(?P<order>\d{1,4})\.)?(?P<kind>jpe?g|png|webp))", re.IGNORECASE
)
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_JSON = -1  # the place of a sample's json among its images
_LOST = 10**4  # and that of a member in a gap, behind all images


class Span(NamedTuple):
    """Bytes of a tar."""

    begin: int
    end: int


class _Entry(NamedTuple):
    offset: int
    size: int
    kind: int
    digest: bytes


@dataclass(frozen=True)
class Scan:
    """A shard's index, and what is not in it."""

    index: ShardIndex
    ignored: int  # members that are no part of a sample
    without_json: int  # keys that have images only
    gaps: tuple[Span, ...]  # bytes that belong to no readable member
    damage: tuple[str, ...]  # keys next to a gap: indexed, and never delivered

    def named(self, shard: str) -> ShardIndex:
        """Return the index under the shard's own name."""
        return replace(self.index, shard=shard)


class _Header(tarfile.TarInfo):
    """A header with a size that can be true: of a negative one tarfile would read the same headers for ever."""

    @property
    def size(self) -> int:
        """Bytes of the member."""
        return self._size

    @size.setter
    def size(self, value: int) -> None:
        if not 0 <= value < _MEMBER_BYTES:
            raise tarfile.InvalidHeaderError("impossible size")  # type: ignore[attr-defined]
        self._size = value

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Take a header apart."""
        found = super().frombuf(buf, encoding, errors)
        if found.type in _EXTENDED and found.size > _EXTENDED_BYTES:
            raise tarfile.InvalidHeaderError("impossible size")  # type: ignore[attr-defined]
        return found


def scan(tar: Path) -> Scan:
    """Index a tar.

    Raises:
        ValueError: it cannot be read.
    """
    samples: dict[str, dict[int, _Entry]] = {}
    gaps: list[Span] = []
    damaged: dict[str, Span] = {}
    ignored = 0
    last: str | None = None  # key of the member before
    if not tar.is_file():
        raise ValueError(f"{tar}: not a file")
    try:
        with tar.open("rb") as data:
            for found in _members(tar, data):
                if isinstance(found, Span):
                    gaps.append(found)
                    if last is not None:
                        damaged[last] = found
                    continue
                key, order = _place(found)
                if gaps and key is not None and _touches(gaps[-1], found):
                    damaged[key] = gaps[-1]
                last = key if key is not None else last
                if key is None or order in samples.get(key, {}):
                    ignored += not found.isdir()
                    continue
                samples.setdefault(key, {})[order] = _entry(found, data)
    except OSError as error:
        raise ValueError(f"{tar}: not a readable shard: {error}") from error
    for key, gap in damaged.items():
        members = samples.setdefault(key, {})
        members[_LOST if _JSON in members else _JSON] = _Entry(gap.begin, 0, 0, bytes(32))
    bare = [key for key, members in samples.items() if _JSON not in members]
    for key in bare:
        del samples[key]
    return Scan(_index(tar.name, samples), ignored, len(bare), tuple(gaps), tuple(damaged))


def _members(tar: Path, data: BinaryIO) -> Iterator[tarfile.TarInfo | Span]:
    """The members in order, and between them what is none."""
    size = tar.stat().st_size
    at = 0  # end of the member before
    try:
        with tarfile.open(tar, "r:", tarinfo=_Header, ignore_zeros=True) as archive:
            while member := archive.next():
                if member.offset > at and not _is_global_header(data, at, member.offset):
                    yield Span(at, member.offset)
                yield member
                at = member.offset_data + (0 if _is_empty(member) else -(-member.size // _BLOCK) * _BLOCK)
                archive.members = []  # type: ignore[attr-defined]  # or it would keep all of them
    except OSError:
        raise
    except Exception as error:  # an empty file, a last member that is cut off; and what tarfile likes on hostile bytes
        logger.debug("%s: %s", tar, error)
    if at > size:
        yield Span(size, size)
    elif size - at < 2 * _BLOCK or not _is_zero(data, at):
        yield Span(at, size)


def _place(member: tarfile.TarInfo) -> tuple[str | None, int]:
    """Key and place of a member; no key where it is no part of a sample."""
    name = member.name.removeprefix("./")
    match = _MEMBER.fullmatch(name) if member.isreg() and not member.issparse() else None
    if match is None or name.startswith("/") or ".." in name.split("/"):
        return None, 0
    return match["key"], _JSON if match["json"] else int(match["order"] or 0)


def _entry(member: tarfile.TarInfo, data: BinaryIO) -> _Entry:
    suffix = member.name.rpartition(".")[2].lower().replace("jpeg", "jpg")
    digest = hashlib.sha256()
    data.seek(member.offset_data)
    left = member.size
    while left and (chunk := data.read(min(left, _CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    return _Entry(member.offset_data, member.size, KINDS.index(suffix), digest.digest())


def _index(name: str, samples: dict[str, dict[int, _Entry]]) -> ShardIndex:
    members = [entries[order] for entries in samples.values() for order in sorted(entries)]
    keys = [key.encode("utf-8", "surrogateescape") for key in samples]
    return ShardIndex(
        shard=name,
        starts=np.cumsum([0, *(len(entries) for entries in samples.values())]),
        offsets=np.array([entry.offset for entry in members], np.uint64),
        sizes=np.array([entry.size for entry in members], np.uint64),
        kinds=np.array([entry.kind for entry in members], np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.uint64),
        keys=b"".join(keys),
        sha256=np.frombuffer(b"".join(entry.digest for entry in members), np.uint8).reshape(-1, 32),
    )


def _touches(gap: Span, member: tarfile.TarInfo) -> bool:
    return gap.end == member.offset


def _is_empty(member: tarfile.TarInfo) -> bool:
    """Links, folders and devices have no data, whatever their size says."""
    return not member.isreg() and member.type in tarfile.SUPPORTED_TYPES


def _is_global_header(data: BinaryIO, begin: int, end: int) -> bool:
    data.seek(begin)
    try:
        header = tarfile.TarInfo.frombuf(data.read(_BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return header.type == tarfile.XGLTYPE and begin + _BLOCK + -(-header.size // _BLOCK) * _BLOCK == end


def _is_zero(data: BinaryIO, begin: int) -> bool:
    data.seek(begin)
    while chunk := data.read(_CHUNK):
        if chunk.strip(b"\0"):
            return False
    return True
