"""A `torch_dist` checkpoint written chunk by chunk: memory for one of them, and read back before it counts.

torch's own writer keeps the last chunk of every tensor until the end.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle  # noqa: S403 - written only
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from megatron_vlmr1.checkpoint.tensorfile import Entry, ahead, as_bytes, flushed
from megatron_vlmr1.checkpoint.torch_dist_files import Chunk, Reader, load

_FILE = "__0_0.distcp"
_HASH_THREADS = 2


def write(
    directory: Path,
    entries: Sequence[Entry],
    chunks: Iterable[tuple[Chunk, torch.Tensor]],
    nothing: Sequence[str],
    progress: Callable[[int], None],
) -> None:
    """Write chunks as they come and the metadata, then read all of it back from the disk.

    Args:
        directory: an empty one.
        entries: the tensors.
        chunks: each one's values, cut in any way.
        nothing: keys of objects that are None.
        progress: told again and again how many bytes of numbers have been written.

    Raises:
        OSError: the disk failed, or gave back other bytes.
    """
    none = _saved_none()
    places = {MetadataIndex(key): _StorageInfo(_FILE, 0, len(none)) for key in nothing}  # one for all of them
    boxes: dict[str, list[Chunk]] = {entry.name: [] for entry in entries}
    meant: dict[Chunk, bytes] = {}
    done = 0
    with ThreadPoolExecutor(1) as pool, (directory / _FILE).open("wb") as file, flushed(file) as flush_early:
        file.write(none)
        for chunk, values in ahead(chunks):
            assert tuple(values.shape) == chunk.size
            offset = file.tell()
            digest = pool.submit(_digest, values)
            _append(values, file)
            index = MetadataIndex(chunk.key, chunk.start, len(boxes[chunk.key]))
            places[index] = _StorageInfo(_FILE, offset, file.tell() - offset)
            boxes[chunk.key].append(chunk)
            meant[chunk] = digest.result()
            flush_early()
            progress(done := done + values.nbytes)
    with (directory / ".metadata").open("wb") as file, flushed(file):
        pickle.dump(_metadata(entries, boxes, nothing, places), file)
    _check(directory, meant, none)


def _append(values: torch.Tensor, file: Any) -> None:
    if values.untyped_storage().nbytes() != values.nbytes:
        values = values.clone()  # a view would be saved with all that it is a view of
    try:
        torch.save(values, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's writer hides what the disk said as it leaves
            raise error.__context__ from None
        raise OSError(f"{file.name}: cannot be written: {' '.join(str(error).split())[:300]}") from error


def _saved_none() -> bytes:
    torch.save([None], buffer := io.BytesIO())  # a list, as megatron-core saves objects
    return buffer.getvalue()


def _digest(values: torch.Tensor) -> bytes:
    return hashlib.sha256(as_bytes(values)).digest()


def _metadata(
    entries: Sequence[Entry],
    boxes: Mapping[str, list[Chunk]],
    nothing: Sequence[str],
    places: dict[MetadataIndex, _StorageInfo],
) -> Metadata:
    found: dict[str, Any] = {}
    for entry in entries:
        parts = [ChunkStorageMetadata(torch.Size(c.start), torch.Size(c.size)) for c in boxes[entry.name]]
        found[entry.name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), parts)
    found |= {key: BytesStorageMetadata() for key in nothing}
    meta = StorageMeta(checkpoint_id="", save_id="")
    return Metadata(found, storage_data=places, storage_meta=meta, version=CURRENT_DCP_VERSION)


def _check(directory: Path, meant: Mapping[Chunk, bytes], head: bytes) -> None:
    """Compare what the metadata and the file say now with what was meant."""
    with (directory / _FILE).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        same = file.read(len(head)) == head
    try:
        found = [(chunk, place, t.dtype) for t in Reader(directory).tensors.values() for chunk, place in t.chunks]
        same &= {chunk for chunk, _, _ in found} == meant.keys()
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            same = same and all(pool.map(lambda each: _digest(load(*each)) == meant[each[0]], found))
    except ValueError as error:
        raise OSError(f"{directory}: the disk gave back other bytes than were written: {error}") from error
    if not same:
        raise OSError(f"{directory}: the disk gave back other bytes than were written")
