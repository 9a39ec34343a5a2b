"""The index beside a shard, and the set of indexed shards that samples are read from.

A shard ``shard-000000.tar`` has an index ``shard-000000.index``: one JSON line (what ``head -1`` shows), then the
tables of `ShardIndex` one after the other, little-endian, in the order of `_TABLES`. Samples are read by offset and
checked by sha256, so damage to one sample, or to any tar header, costs no other sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmr1.data import rows
from megatron_vlmr1.types import Damage, Sample

KINDS = ("json", "jpg", "png", "webp")
MANIFEST = "shards.json"
_FORMAT = "vlmr1-shard-index-1"
_TABLES = (("starts", "<u4"), ("offsets", "<u8"), ("sizes", "<u8"), ("kinds", "u1"), ("key_ends", "<u4"))

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Members of one shard; sample `i` owns members ``starts[i]:starts[i + 1]``, its json first, then its images."""

    shard: str  # file name of the tar
    starts: npt.NDArray[np.unsignedinteger]  # [samples + 1]
    offsets: npt.NDArray[np.unsignedinteger]  # [members], bytes from the start of the tar to the member's data
    sizes: npt.NDArray[np.unsignedinteger]  # [members], bytes
    kinds: npt.NDArray[np.unsignedinteger]  # [members], position in KINDS
    key_ends: npt.NDArray[np.unsignedinteger]  # [samples], end of each key in `keys`
    keys: bytes  # all keys, UTF-8
    sha256: npt.NDArray[np.unsignedinteger]  # [members, 32]
    digest: str = ""  # sha256 of the tables, hexadecimal

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, row: int) -> str:
        """Return the key of sample `row`."""
        begin = int(self.key_ends[row - 1]) if row else 0
        return self.keys[begin : int(self.key_ends[row])].decode("utf-8", "replace")

    def body(self) -> bytes:
        """Return the tables as they lie in the file."""
        tables = [getattr(self, name).astype(dtype).tobytes() for name, dtype in _TABLES]
        return b"".join((*tables, self.sha256.astype(np.uint8).tobytes(), self.keys))


def index_path(tar: Path) -> Path:
    """Return where the index of shard `tar` lies."""
    return tar.with_suffix(".index")


def write_index(index: ShardIndex, path: Path) -> None:
    """Write and fsync an index file."""
    body = index.body()
    header = {
        "format": _FORMAT,
        "shard": index.shard,
        "samples": len(index),
        "members": len(index.offsets),
        "key_bytes": len(index.keys),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())


def read_index(path: Path) -> ShardIndex:
    """Read and check an index file.

    Raises:
        ValueError: it is missing, damaged or of another format.
    """
    try:
        header, _, body = path.read_bytes().partition(b"\n")
        head = json.loads(header)
        if head["format"] != _FORMAT:
            raise ValueError("unknown format")
        samples, members, key_bytes = (int(head[name]) for name in ("samples", "members", "key_bytes"))
        digest = hashlib.sha256(body).hexdigest()
        if digest != head["sha256"]:
            raise ValueError("its checksum does not match")
        lengths = {"starts": samples + 1, "key_ends": samples}
        tables: dict[str, Any] = {}
        at = 0
        for name, dtype in _TABLES:
            tables[name] = np.frombuffer(body, dtype, lengths.get(name, members), at)
            at += tables[name].nbytes
        sha256 = np.frombuffer(body, np.uint8, 32 * members, at).reshape(-1, 32)
        keys = body[at + 32 * members :]
        ordered = (np.diff(tables[name].astype(np.int64)).min(initial=0) >= 0 for name in ("starts", "key_ends"))
        if len(keys) != key_bytes or tables["starts"][-1] != members or not all(ordered):
            raise ValueError("its tables do not match its header")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; `vlmr1 shards index` makes it anew") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid shard index ({error}); `vlmr1 shards index` makes it anew") from error
    return ShardIndex(shard=path.with_suffix(".tar").name, sha256=sha256, keys=keys, digest=digest, **tables)


class ShardSet:
    """Indexed shards of one directory, addressed as one sequence of samples in order of shard names.

    Holds about 120 bytes a sample with one image; opens a shard only while it reads from it.
    """

    def __init__(self, directory: Path, indexes: Iterable[ShardIndex]) -> None:
        self.directory = directory
        self._indexes = tuple(indexes)
        self.firsts = np.cumsum([0, *(len(index) for index in self._indexes)])  # [shards + 1], first sample of each
        self.shards_read: set[str] = set()

    @classmethod
    def open(cls, directory: str | Path) -> ShardSet:
        """Load the indexes of a directory. Shards that are gone are damage of their samples, not an error.

        Raises:
            ValueError: no such directory, no shard in it, or a shard without a valid index.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ValueError(f"{directory}: no such directory of shards; build it with `vlmr1 shards build`")
        tars = {path.name for path in directory.glob("*.tar")}
        names = tars | {path.with_suffix(".tar").name for path in directory.glob("*.index")} | _manifest(directory)
        if not names:
            raise ValueError(f"{directory}: holds no shards; build them with `vlmr1 shards build`")
        return cls(directory, (read_index(index_path(directory / name)) for name in sorted(names)))

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def names(self) -> tuple[str, ...]:
        """File names of the shards, in order."""
        return tuple(index.shard for index in self._indexes)

    def digest(self) -> str:
        """Return the sha256 of all indexes: equal digests mean the same samples in the same order."""
        lines = (f"{index.shard} {index.digest}\n" for index in self._indexes)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def locate(self, i: int) -> tuple[str, str]:
        """Return (shard, key) of sample `i`."""
        index, row = self._row(i)
        return index.shard, index.key(row)

    def read(self, i: int) -> Sample | Damage:
        """Return sample `i`, or why it is lost; never raises for what lies on the disk."""
        index, row = self._row(i)
        self.shards_read.add(index.shard)
        key = index.key(row)
        try:
            text, *images = self._members(index, range(int(index.starts[row]), int(index.starts[row + 1])))
            return _sample(key, text, tuple(images))
        except FileNotFoundError:
            return Damage(index.shard, key, "the shard is missing")
        except OSError as error:
            return Damage(index.shard, key, f"the shard cannot be read: {error.strerror}")
        except ValueError as error:
            return Damage(index.shard, key, str(error))

    def _row(self, i: int) -> tuple[ShardIndex, int]:
        assert 0 <= i < len(self), f"sample {i} of {len(self)}"
        shard = int(np.searchsorted(self.firsts, i, "right")) - 1
        return self._indexes[shard], i - int(self.firsts[shard])

    def _members(self, index: ShardIndex, members: range) -> list[bytes]:
        out = []
        fd = os.open(self.directory / index.shard, os.O_RDONLY)
        try:
            end = os.fstat(fd).st_size
            for member in members:
                offset, size = int(index.offsets[member]), int(index.sizes[member])
                what = f"{KINDS[int(index.kinds[member])]} member at byte {offset}"
                if offset + size > end:  # before reading: pread would allocate what a hostile index claims
                    raise ValueError(f"{what} lies beyond the end of the shard")
                data = os.pread(fd, size, offset)
                if hashlib.sha256(data).digest() != index.sha256[member].tobytes():
                    raise ValueError(f"{what} does not match its checksum")
                out.append(data)
        finally:
            os.close(fd)
        return out


def verify(directory: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Read every sample of a directory of shards.

    Returns:
        ``{"indexed": n, "delivered": n, "damaged": [{"shard", "key", "reason"}]}``, indexed = delivered + damaged.

    Raises:
        ValueError: as `ShardSet.open`.
    """
    shards = ShardSet.open(directory)
    damaged = []
    for i in range(len(shards)):
        if isinstance(item := shards.read(i), Damage):
            damaged.append({"shard": item.shard, "key": item.key, "reason": item.reason})
        if progress:
            progress(i + 1, len(shards))
    return {"indexed": len(shards), "delivered": len(shards) - len(damaged), "damaged": damaged}


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


def _manifest(directory: Path) -> set[str]:
    path = directory / MANIFEST
    if not path.is_file():
        return set()
    try:
        names = json.loads(path.read_bytes())["shards"]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w-]+\.tar", name) for name in names):
            raise ValueError("shards must be a list of file names")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of shards ({error}): build the shards again") from error
    return set(names)
