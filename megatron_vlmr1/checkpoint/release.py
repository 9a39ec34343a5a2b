"""A checkpoint as a directory to publish: weights recast and cut into shards of a size, streamed and resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from megatron_vlmr1.checkpoint import partial, tensorfile
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.checkpoint.partial import check_new, need_space
from megatron_vlmr1.checkpoint.tensorfile import Entry
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.checkpoint.writer import MAX_SHARD_BYTES, copy_side_files, name_dtype, shard_name, write_index
from megatron_vlmr1.models.families import of, read_shape
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.runtime import distributed

_PIECE_BYTES = 1 << 24  # memory of larger ones is taken from the system anew each time

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Source(Protocol):
    """Tensors under their published names, read piece by piece."""

    directory: Path
    """Where they lie."""

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        ...

    def entry(self, name: str, dtype: torch.dtype | None = None) -> Entry:
        """Return a tensor's name, shape and type; `dtype` in place of its own."""
        ...

    def pieces(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        """Read a tensor in its own type, in pieces of at most so many bytes (or one row) along its first dimension."""
        ...

    def files(self) -> list[Path]:
        """Return the files that it is read from."""
        ...


def export(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    more: Mapping[str, bytes] | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Make a Hugging Face directory of a checkpoint; an export that was interrupted goes on where it stopped.

    It is made in ``OUT.partial`` and gets its name when every byte has been read back. The index comes last.

    Args:
        checkpoint: a checkpoint, a run directory (its newest), or a Hugging Face directory.
        out: new directory.
        dtype: of the weights; None keeps each tensor's own.
        max_shard_bytes: largest shard; a larger tensor has one of its own.
        more: files of the model card by name, in place of the checkpoint's own of these names.
        progress: told of every piece.

    Raises:
        ValueError: `out` exists, the checkpoint is damaged or not there, or the disk is too small.
        OSError: the disk failed; nothing was published.
    """
    source = hf_directory(checkpoint, check=distributed.place()[0] == 0)
    check_new(out, source)
    weights = HfWeights(source)
    weights.check(read_shape(source))
    return publish(weights, source, out, dtype, max_shard_bytes, more or {}, progress)


def publish(
    weights: Source,
    side: Path,
    out: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    more: Mapping[str, bytes],
    progress: Progress,
) -> Path:
    """Make a Hugging Face directory of tensors and of the files beside them, as `export` does.

    In a job all ranks call it, each writes its share of the shards, and rank 0 does the rest.

    Args:
        weights: all tensors that config.json asks for.
        side: directory with config.json, tokenizer and whatever else belongs to the model.
        out: new directory.
        dtype: of the weights; None keeps each tensor's own.
        max_shard_bytes: largest shard; a larger tensor has one of its own.
        more: files by name, in place of those of these names in `side`.
        progress: told of every piece of this rank's share.

    Raises:
        ValueError: `out`.partial is somebody else's, or the disk is too small or fills up.
        OSError: the disk failed; nothing was published.
    """
    shape = read_shape(side)
    order = [*of(shape).tensor_shapes(shape)]
    order += sorted(weights.names() - set(order))  # a tied model's second copy, where it has one
    shards = _cut([weights.entry(name, dtype) for name in order], max_shard_bytes)
    place = partial.path_of(out)
    files = [(place / shard_name(i, len(shards)), shard) for i, shard in enumerate(shards, start=1)]
    rank, world = distributed.place()

    def complete() -> None:
        _add_side_files(side, place, {entry.dtype for shard in shards for entry in shard}, more)
        if len(shards) > 1:
            write_index(place)
        HfWeights(place).check(shape)

    partial.make(
        out,
        plan_of(weights, side, shape, [[(entry.name, str(entry.dtype)) for entry in shard] for shard in shards]),
        lambda: need_space(place, _bytes(_missing(files))),
        lambda: _write_shards(weights, files[rank::world], progress),
        complete,
    )
    return out


def _missing(files: Sequence[tuple[Path, list[Entry]]]) -> list[list[Entry]]:
    return [shard for path, shard in files if not path.exists()]


def _write_shards(weights: Source, files: Sequence[tuple[Path, list[Entry]]], progress: Progress) -> None:
    """Write those shards that are not there yet."""
    total = _bytes(shard for _, shard in files)
    done = total - _bytes(_missing(files))
    progress(done, total)
    for path, shard in files:
        if not path.exists():
            tensorfile.write(path, shard, lambda e: _pieces(weights, e), after(done, total, progress))
            done += _bytes([shard])


def _cut(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Fill shards in order, each with at most `limit` bytes or one larger tensor."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def after(before: int, total: int, progress: Progress) -> Callable[[int], None]:
    """Return what tells of bytes done on top of those before."""
    return lambda done: progress(before + done, total)


def _bytes(shards: Iterable[Sequence[Entry]]) -> int:
    return sum(entry.nbytes for shard in shards for entry in shard)


def plan_of(weights: Source, side: Path, shape: VlmShape, files: object) -> str:
    """Return what must be the same for an interrupted conversion to go on; `files` says how it is cut."""
    read = [(path.name, info.st_size, info.st_mtime_ns) for path in weights.files() for info in [path.stat()]]
    places = [str(path.resolve()) for path in (weights.directory, side)]
    return json.dumps({"source": places, "read": read, "shape": asdict(shape), "files": files})


def _pieces(weights: Source, entry: Entry) -> Iterator[torch.Tensor]:
    for piece in weights.pieces(entry.name, _PIECE_BYTES):
        yield piece.to(entry.dtype)


def _add_side_files(side: Path, place: Path, dtypes: set[torch.dtype], more: Mapping[str, bytes]) -> None:
    copy_side_files(side, place)
    if len(dtypes) == 1:
        name_dtype(place, next(iter(dtypes)))
    for name, content in more.items():
        (place / name).write_bytes(content)
