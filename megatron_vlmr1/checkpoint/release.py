"""A checkpoint as a directory to publish: weights recast and cut into shards of a size, streamed and resumable."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from megatron_vlmr1.checkpoint import store, tensorfile
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.checkpoint.tensorfile import Entry
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.checkpoint.writer import MAX_SHARD_BYTES, copy_side_files, name_dtype, shard_name, write_index
from megatron_vlmr1.models.families import of, read_shape
from megatron_vlmr1.runtime import distributed

_PIECE_BYTES = 1 << 24  # memory of larger ones is taken from the system anew each time
_PLAN = ".export.json"
_SPARE_BYTES = 1 << 26  # of disk space, for everything but weights

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
    check_new(out)
    source = hf_directory(checkpoint, check=distributed.place()[0] == 0)
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
    partial = out.with_name(out.name + ".partial")
    files = [(partial / shard_name(i, len(shards)), shard) for i, shard in enumerate(shards, start=1)]
    rank, world = distributed.place()

    def start() -> None:
        begin(partial, _plan(weights, shards))
        need_space(partial, _bytes(_missing(files)))

    def write() -> None:
        with room(partial):
            _write_shards(weights, files[rank::world], progress)

    def complete() -> None:
        with room(partial):
            _add_side_files(side, partial, {entry.dtype for shard in shards for entry in shard}, more)
            if len(shards) > 1:
                write_index(partial)
            HfWeights(partial).check(shape)
            finish(partial, out)

    distributed.together(start, only_first=True)
    distributed.together(write)
    distributed.together(complete, only_first=True)
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
            tensorfile.write(path, shard, lambda e: _pieces(weights, e), _after(done, total, progress))
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


def _after(before: int, total: int, progress: Progress) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _bytes(shards: Iterable[Sequence[Entry]]) -> int:
    return sum(entry.nbytes for shard in shards for entry in shard)


def _plan(weights: Source, shards: Sequence[Sequence[Entry]]) -> str:
    """What must be the same for an interrupted export to go on."""
    files = [(path.name, info.st_size, info.st_mtime_ns) for path in weights.files() for info in [path.stat()]]
    cut = [[(entry.name, str(entry.dtype)) for entry in shard] for shard in shards]
    return json.dumps({"source": str(weights.directory.resolve()), "files": files, "shards": cut})


def begin(partial: Path, plan: str) -> None:
    """Make the directory, or go on in one that was made for the same export; another's is thrown away.

    Raises:
        ValueError: there is a directory of that name that no export has begun.
    """
    path = partial / _PLAN
    if partial.exists() and not path.is_file():
        raise ValueError(f"{partial}: exists and is not an interrupted export; remove it or name another directory")
    if path.is_file() and path.read_text(encoding="utf-8") != plan:
        shutil.rmtree(partial)
    if not partial.exists():
        partial.mkdir(parents=True)
        path.write_text(plan, encoding="utf-8")


def finish(partial: Path, out: Path) -> None:
    """Give a finished directory its name.

    Raises:
        OSError: the disk failed.
    """
    (partial / _PLAN).unlink()
    store.flush_tree(partial)
    partial.rename(out)


def check_new(out: Path) -> None:
    """Refuse a directory that exists.

    Raises:
        ValueError: it does.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; name a new directory")


def need_space(directory: Path, size: int) -> None:
    """Ask whether so many bytes of weights fit on the disk; a directory with nothing but a plan is taken away if not.

    Raises:
        ValueError: they don't.
    """
    free = shutil.disk_usage(directory).free
    if size + _SPARE_BYTES > free:
        if [path.name for path in directory.iterdir()] == [_PLAN]:
            shutil.rmtree(directory)
        raise ValueError(
            f"{directory}: {size / 1e9:.1f} GB are to be written, but the disk has {free / 1e9:.1f} GB left"
        )


@contextmanager
def room(partial: Path) -> Iterator[None]:
    """Tell a disk that fills up while `partial` is written, which the user can mend, from one that fails.

    Raises:
        ValueError: it is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{partial}: {error.strerror}; make room and give the same command again") from error


def _pieces(weights: Source, entry: Entry) -> Iterator[torch.Tensor]:
    for piece in weights.pieces(entry.name, _PIECE_BYTES):
        yield piece.to(entry.dtype)


def _add_side_files(side: Path, partial: Path, dtypes: set[torch.dtype], more: Mapping[str, bytes]) -> None:
    copy_side_files(side, partial)
    if len(dtypes) == 1:
        name_dtype(partial, next(iter(dtypes)))
    for name, content in more.items():
        (partial / name).write_bytes(content)
