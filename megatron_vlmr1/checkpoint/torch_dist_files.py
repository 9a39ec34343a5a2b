"""The files of a `torch_dist` checkpoint: chunks of tensors, and the metadata that says where each of them lies.

They are those of torch's distributed checkpoint, whose own reader runs the metadata's pickle and whole tensors at once;
here nothing is unpickled freely, and a tensor is read box by box.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_vlmr1.checkpoint.pickles import read_metadata

_KEPT_BYTES = 1 << 29  # of chunks that further pieces will need
_LARGEST = 1 << 48  # length of an axis, offset in a file: more is damage

Index = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor."""

    key: str
    start: Index
    stop: Index

    @classmethod
    def rows(cls, key: str, lead: Index, start: int, stop: int, rest: Index) -> Chunk:
        """Return some rows, whole in the axes that follow, at one index of the axes that lead."""
        zeros = (0 for _ in rest)
        return cls(key, (*lead, start, *zeros), (*(index + 1 for index in lead), stop, *rest))

    @property
    def size(self) -> Index:
        """Its length along each axis."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    def common(self, other: Chunk) -> Chunk | None:
        """Return what two boxes of a tensor share."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Chunk(self.key, start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def within(self, outer: Chunk) -> tuple[slice, ...]:
        """Return where it lies in a tensor of the outer box."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))


@dataclass(frozen=True)
class Place:
    """Where a chunk's bytes lie."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    size: Index
    dtype: torch.dtype
    chunks: list[tuple[Chunk, Place]]


def load(chunk: Chunk, place: Place, dtype: torch.dtype) -> torch.Tensor:
    """Load one chunk, whatever else its file holds.

    Raises:
        ValueError: these bytes are not that chunk.
    """
    try:
        with place.path.open("rb", buffering=0) as file:
            view = _create_file_view(file, place.offset, place.length)
            values = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise ValueError(f"{place.path}: not found") from error
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{place.path}: {chunk.key} at {list(chunk.start)} cannot be read: {reason}") from error
    if type(values) is not torch.Tensor or values.layout != torch.strided or values.is_quantized:
        raise ValueError(f"{place.path}: {chunk.key} at {list(chunk.start)} is not a plain tensor")
    if tuple(values.shape) != chunk.size or values.dtype != dtype:
        raise ValueError(
            f"{place.path}: {chunk.key} at {list(chunk.start)} is {list(values.shape)} {values.dtype}, "
            f"but the metadata says {list(chunk.size)} {dtype}"
        )
    return values.detach()


class Reader:
    """The tensors of a `torch_dist` directory, read box by box."""

    def __init__(self, directory: Path) -> None:
        """Read the metadata, and look whether all that it names is there.

        Raises:
            ValueError: hostile or damaged metadata, a missing or truncated file.
        """
        self.directory = directory
        metadata = read_metadata(directory)
        try:
            self.tensors = _tensors(metadata, directory)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{directory / '.metadata'}: damaged: {repr(error)[:200]}") from error
        self._kept: OrderedDict[Chunk, torch.Tensor] = OrderedDict()
        _check_files(self)

    def files(self) -> list[Path]:
        """Return the files that hold the tensors."""
        return sorted({place.path for stored in self.tensors.values() for _, place in stored.chunks})

    def read(self, box: Chunk) -> torch.Tensor:
        """Read a box of a tensor.

        Chunks that reach beyond the box are kept for the next one, up to a number of bytes.

        Raises:
            ValueError: the chunks are damaged, overlap, or leave a hole.
        """
        stored = self.tensors[box.key]
        a, b = box.start[:1], box.stop[:1]  # the first axis alone rules out most of thousands of chunks
        near = ((chunk, place) for chunk, place in stored.chunks if chunk.start[:1] <= b and a <= chunk.stop[:1])
        shared = [(chunk, place, part) for chunk, place in near if (part := chunk.common(box))]
        overlap = any(one[2].common(other[2]) for i, one in enumerate(shared) for other in shared[:i])
        if overlap or sum(prod(part.size) for _, _, part in shared) != prod(box.size):
            what = "overlap" if overlap else "leave a hole"
            raise ValueError(f"{self.directory / '.metadata'}: chunks of {box.key} {what} at {list(box.start)}")
        out = torch.empty(box.size, dtype=stored.dtype)
        for chunk, place, part in shared:
            out[part.within(box)] = self._load(chunk, place, stored.dtype)[part.within(chunk)]
            if all(a <= b for a, b in zip(chunk.stop, box.stop, strict=True)):
                del self._kept[chunk]
        return out

    def _load(self, chunk: Chunk, place: Place, dtype: torch.dtype) -> torch.Tensor:
        if chunk not in self._kept:
            size = prod(chunk.size) * dtype.itemsize
            while self._kept and size + sum(values.nbytes for values in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            self._kept[chunk] = load(chunk, place, dtype)
        self._kept.move_to_end(chunk)
        return self._kept[chunk]


def _tensors(metadata: Any, directory: Path) -> dict[str, Stored]:
    """Copy what we need out of metadata that may say anything; without the optimizer's state and small objects."""
    out = {}
    for key, found in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"a key is {type(key).__name__}")
        if isinstance(found, BytesStorageMetadata) or key.startswith(("optimizer.", "chained_")):
            continue
        size, dtype = _index(found.size), found.properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"the type of {key} is none")
        chunks = [_chunk(key, size, part) for part in found.chunks]
        if sum(prod(chunk.size) for chunk in chunks) != prod(size):
            raise TypeError(f"the chunks of {key} are not the whole of it")
        places = metadata.storage_data
        out[key] = Stored(size, dtype, [(c, _place(places[MetadataIndex(key, c.start)], directory)) for c in chunks])
    return out


def _chunk(key: str, size: Index, found: Any) -> Chunk:
    start, length = _index(found.offsets), _index(found.sizes)
    if not len(start) == len(length) == len(size):
        raise TypeError(f"a chunk of {key} has another number of axes")
    stop = tuple(a + b for a, b in zip(start, length, strict=True))
    if any(a > b for a, b in zip(stop, size, strict=True)):
        raise TypeError(f"a chunk of {key} lies outside")
    return Chunk(key, start, stop)


def _index(found: Any) -> Index:
    index = tuple(found)
    if not all(type(number) is int and 0 <= number < _LARGEST for number in index):
        raise TypeError("a size is not a whole number of reasonable size")
    return index


def _place(info: Any, directory: Path) -> Place:
    name, offset, length = info.relative_path, info.offset, info.length
    if not isinstance(name, str):
        raise TypeError("a file's name is not text")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{directory / '.metadata'}: names {str(name)[:80]!r}, which is not a file of this directory")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{directory / '.metadata'}: {name} is compressed, which is not supported")
    _index((offset, length))
    return Place(directory / name, offset, length)


def _check_files(reader: Reader) -> None:
    needed: dict[Path, int] = {}
    for stored in reader.tensors.values():
        for _, place in stored.chunks:
            needed[place.path] = max(needed.get(place.path, 0), place.offset + place.length)
    for path, size in needed.items():
        if not path.is_file():
            raise ValueError(f"{path}: not found, but {reader.directory / '.metadata'} names it")
        if path.stat().st_size < size:
            raise ValueError(f"{path}: truncated: {path.stat().st_size} bytes of at least {size}")
