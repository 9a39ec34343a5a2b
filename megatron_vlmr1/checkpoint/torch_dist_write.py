"""A `torch_dist` checkpoint written chunk by chunk, in files that are whole and proven once they have their names.

torch's own writer keeps the last chunk of every tensor until the end, and begins anew when it was interrupted. Where
the chunks of a file lie is noted beside the checkpoint, until its metadata holds it.
"""

from __future__ import annotations

import io
import json
import pickle  # noqa: S403 - written only
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vlmr1.checkpoint.proven import ProvenFile, proven
from megatron_vlmr1.checkpoint.tensorfile import Entry, ahead
from megatron_vlmr1.checkpoint.torch_dist_files import Chunk, Reader

_NOTHING = "__0_nothing.distcp"

Span = tuple[int, int]  # offset and length in a file


class Files:
    """The files of a checkpoint in the making, and the notes of where their chunks lie."""

    def __init__(self, directory: Path, notes: Path, chunks: Sequence[Chunk], entries: Sequence[Entry], size: int):
        """Share chunks out over files.

        Args:
            directory: of the checkpoint.
            notes: another directory, for as long as it is in the making.
            chunks: all of them.
            entries: the tensors that they cut.
            size: bytes of numbers in a file, or one larger chunk.
        """
        self.directory, self.notes = directory, notes
        self.entries = {entry.name: entry for entry in entries}
        self.chunks: list[list[Chunk]] = []
        room = 0
        for chunk in chunks:
            if not self.chunks or self.nbytes([chunk]) > room:
                self.chunks.append([])
                room = size
            self.chunks[-1].append(chunk)
            room -= self.nbytes([chunk])

    def nbytes(self, chunks: Iterable[Chunk]) -> int:
        """Return the bytes of some chunks' numbers."""
        return sum(prod(chunk.size) * self.entries[chunk.key].dtype.itemsize for chunk in chunks)

    def missing(self) -> list[int]:
        """Return the numbers of the files that are not there yet."""
        return [n for n in range(len(self.chunks)) if not (self._path(n).exists() and self._note(n).exists())]

    def write(self, number: int, read: Callable[[Chunk], torch.Tensor], progress: Callable[[int], None]) -> None:
        """Write one file.

        Args:
            number: which one.
            read: returns a chunk's values.
            progress: told again and again how many bytes of its numbers have been written.

        Raises:
            OSError: the disk failed, or gave back other bytes; there is no file of that name.
        """
        spans: list[Span] = []
        done = 0
        with proven(self._path(number)) as file:
            for values in ahead(map(read, self.chunks[number])):
                offset = file.tell()
                _append(values, file)
                spans.append((offset, file.tell() - offset))
                progress(done := done + values.nbytes)
            with proven(self._note(number)) as note:
                note.write(json.dumps(spans).encode())

    def complete(self, nothing: Sequence[str]) -> None:
        """Write the metadata and look whether it says what it should; all files are there.

        Args:
            nothing: keys of objects that are None.

        Raises:
            OSError: the disk failed, or gave back other bytes.
        """
        with proven(self.directory / _NOTHING) as file:
            file.write(none := _saved_none())
        places = {MetadataIndex(key): _StorageInfo(_NOTHING, 0, len(none)) for key in nothing}  # one for all of them
        boxes: dict[str, list[Chunk]] = {name: [] for name in self.entries}
        for chunk, info in self._places():
            places[MetadataIndex(chunk.key, chunk.start, len(boxes[chunk.key]))] = info
            boxes[chunk.key].append(chunk)
        with proven(self.directory / ".metadata") as file:
            file.write(pickle.dumps(_metadata(self.entries, boxes, nothing, places)))
        try:
            found = {chunk for tensor in Reader(self.directory).tensors.values() for chunk, _ in tensor.chunks}
        except ValueError as error:
            raise OSError(f"{self.directory}: the disk gave back other bytes than were written: {error}") from error
        assert found == {chunk for chunks in self.chunks for chunk in chunks}

    def _path(self, number: int) -> Path:
        return self.directory / f"__{number}_0.distcp"

    def _note(self, number: int) -> Path:
        return self.notes / f"{number}.json"

    def _places(self) -> Iterator[tuple[Chunk, _StorageInfo]]:
        for number, chunks in enumerate(self.chunks):
            spans = json.loads(self._note(number).read_bytes())
            for chunk, (offset, length) in zip(chunks, spans, strict=True):
                yield chunk, _StorageInfo(self._path(number).name, offset, length)


def _append(values: torch.Tensor, file: ProvenFile) -> None:
    if values.untyped_storage().nbytes() != values.nbytes:
        values = values.clone()  # a view would be saved with all that it is a view of
    try:
        torch.save(values, file)  # type: ignore[arg-type]
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's writer hides what the disk said as it leaves
            raise error.__context__ from None
        raise OSError(f"{file.name}: cannot be written: {' '.join(str(error).split())[:300]}") from error


def _saved_none() -> bytes:
    torch.save([None], buffer := io.BytesIO())  # a list, as megatron-core saves objects
    return buffer.getvalue()


def _metadata(
    entries: Mapping[str, Entry],
    boxes: Mapping[str, list[Chunk]],
    nothing: Sequence[str],
    places: dict[MetadataIndex, _StorageInfo],
) -> Metadata:
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        parts = [ChunkStorageMetadata(torch.Size(c.start), torch.Size(c.size)) for c in boxes[name]]
        found[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), parts)
    found |= {key: BytesStorageMetadata() for key in nothing}
    meta = StorageMeta(checkpoint_id="", save_id="")
    return Metadata(found, storage_data=places, storage_meta=meta, version=CURRENT_DCP_VERSION)
