"""Hugging Face directories to megatron-core's `torch_dist` model checkpoints and back, streamed.

The keys are those that GPTModel has in megatron-core, so that Megatron-LM and Megatron-Bridge find them; the tower
lies beside it under its published names.
"""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_vlmr1.checkpoint import partial, release
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.checkpoint.partial import check_new, need_space
from megatron_vlmr1.checkpoint.release import Progress, plan_of
from megatron_vlmr1.checkpoint.tensorfile import Entry, row_ranges
from megatron_vlmr1.checkpoint.torch_dist_files import Chunk
from megatron_vlmr1.checkpoint.torch_dist_names import LANGUAGE_PREFIX, Part, extra_states, parts
from megatron_vlmr1.checkpoint.torch_dist_source import MegatronWeights
from megatron_vlmr1.checkpoint.torch_dist_write import Files
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.checkpoint.writer import MAX_SHARD_BYTES, copy_side_files, name_dtype
from megatron_vlmr1.models import families
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.runtime import distributed

_PIECE_BYTES = 1 << 24
_TRACKER = "latest_checkpointed_iteration.txt"
_SIDE = "huggingface"
_NOTES = "notes"
_RELEASE = "release"


def export_torch_dist(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done, total: None,
    prefix: str = LANGUAGE_PREFIX,
    max_file_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Make a Megatron checkpoint of a model: OUT/release, and OUT/huggingface with what lay beside the weights.

    It is made in ``OUT.partial`` and gets its name when every byte has been read back; one that was interrupted goes on
    where it stopped. In a job all ranks call it and share the files out. A second copy of the embedding that a tied
    model's directory may hold is left out.

    Args:
        checkpoint: a checkpoint, a run directory (its newest), or a Hugging Face directory.
        out: new directory.
        dtype: of the weights; None keeps each tensor's own.
        progress: told of every piece of this rank's share.
        prefix: of the language model's keys; empty for a plain GPTModel.
        max_file_bytes: numbers in one file.

    Raises:
        ValueError: `out` exists, the checkpoint is damaged or not there, or the disk is too small or fills up.
        OSError: the disk failed; nothing was published.
    """
    source = hf_directory(checkpoint, check=distributed.place()[0] == 0)
    check_new(out, source)
    weights = HfWeights(source)
    weights.check(shape := families.read_shape(source))
    found = parts(shape, prefix)
    entries = _entries(weights, found, shape.text.num_layers, dtype)
    pieces = _pieces(found, entries)
    place = partial.path_of(out)
    files = Files(place / _RELEASE, place / _NOTES, [*pieces], [*entries.values()], max_file_bytes)
    kinds = [(name, str(entry.dtype)) for name, entry in entries.items()]

    def prepare() -> None:
        need_space(place, sum(files.nbytes(files.chunks[number]) for number in files.missing()))
        for directory in (files.directory, files.notes):
            directory.mkdir(exist_ok=True)

    def read(chunk: Chunk) -> torch.Tensor:
        part, start, stop = pieces[chunk]
        return _part_rows(weights, part, start, stop).to(entries[part.key].dtype).view(chunk.size)

    def complete() -> None:
        files.complete(extra_states(shape, prefix))
        save_config(CheckpointingConfig("torch_dist", 1), str(files.directory))
        (files.directory / "common.pt").write_bytes(_common(shape))
        (side := place / _SIDE).mkdir(exist_ok=True)
        copy_side_files(source, side)
        if len(dtypes := {entry.dtype for entry in entries.values()}) == 1:
            name_dtype(side, next(iter(dtypes)))
        (place / _TRACKER).write_text(_RELEASE, encoding="utf-8")
        shutil.rmtree(files.notes)

    plan = plan_of(weights, source, shape, {"prefix": prefix, "size": max_file_bytes, "tensors": kinds})
    partial.make(out, plan, prepare, lambda: _write_share(files, read, progress), complete)
    return out


def _write_share(files: Files, read: Callable[[Chunk], torch.Tensor], progress: Progress) -> None:
    """Write those of this rank's files that are not there yet."""
    rank, world = distributed.place()
    mine = range(rank, len(files.chunks), world)
    sizes = {number: files.nbytes(files.chunks[number]) for number in mine}
    missing = [number for number in files.missing() if number in sizes]
    total = sum(sizes.values())
    done = total - sum(sizes[number] for number in missing)
    progress(done, total)
    for number in missing:
        files.write(number, read, release.after(done, total, progress))
        done += sizes[number]


def import_torch_dist(
    source: Path,
    out: Path,
    config: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Make a Hugging Face directory of a Megatron checkpoint; an import that was interrupted goes on where it stopped.

    Optimizer state is left out, and so are the rows that pad the vocabulary.

    Args:
        source: a directory with ``.metadata``, or one whose ``latest_checkpointed_iteration.txt`` names one.
        out: new directory.
        config: Hugging Face directory with config.json and tokenizer; None takes ``huggingface`` in or beside `source`.
        dtype: of the weights; None keeps each tensor's own.
        max_shard_bytes: largest shard; a larger tensor has one of its own.
        progress: told of every piece.

    Raises:
        ValueError: `out` exists, the checkpoint is damaged, hostile or of another model, or the disk is too small.
        OSError: the disk failed; nothing was published.
    """
    check_new(out, source)
    directory = torch_dist_directory(source)
    side = _side_files(directory) if config is None else hf_directory(config, check=False)
    weights = MegatronWeights(directory, families.read_shape(side))
    return release.publish(weights, side, out, dtype, max_shard_bytes, {}, progress)


def torch_dist_directory(path: Path) -> Path:
    """Return the `torch_dist` directory in `path`: itself, or the one that its tracker file names.

    Raises:
        ValueError: there is none.
    """
    if (path / ".metadata").is_file():
        return path
    tracker = path / _TRACKER
    if not tracker.is_file():
        raise ValueError(f"{path}: no torch_dist checkpoint in it; expected .metadata, or {_TRACKER} beside a folder")
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word != _RELEASE and not (word.isascii() and word.isdigit()):
        raise ValueError(f"{tracker}: says {word[:40]!r}, which is neither a number nor 'release'")
    return path / (_RELEASE if word == _RELEASE else f"iter_{int(word):07d}")


def _side_files(directory: Path) -> Path:
    for side in (directory / _SIDE, directory.resolve().parent / _SIDE):
        if (side / "config.json").is_file():
            _check_links(side)
            return side
    raise ValueError(f"{directory}: no {_SIDE}/config.json in or beside it; name the model's with --config HF_DIR")


def _check_links(side: Path) -> None:
    """Refuse links that lead out of the checkpoint: it may be anybody's, and what they lead to would be published."""
    for entry in side.rglob("*"):
        if not entry.resolve().is_relative_to(side.resolve()):
            raise ValueError(f"{entry}: a link out of the checkpoint; name the model's own files with --config HF_DIR")


def _common(shape: VlmShape) -> bytes:
    """Return what Megatron-LM asks for beside the tensors: sizes to compare, and what was saved and how."""
    text = shape.text
    args = Namespace(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_heads,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
    layers = {"non_homogeneous_layers": False, "singleton_local_shards": False}
    torch.save(
        {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": layers}, buffer := io.BytesIO()
    )
    return buffer.getvalue()


def _entries(weights: HfWeights, found: list[Part], layers: int, dtype: torch.dtype | None) -> dict[str, Entry]:
    """Return the tensors to write by key, layers stacked."""
    out: dict[str, Entry] = {}
    for part in found:
        size = part.shape if part.layer is None else (layers, *part.shape)
        for name, _, _ in part.blocks:
            kind = weights.entry(str(name), dtype).dtype
            first = out.setdefault(part.key, Entry(part.key, size, kind))
            if kind != first.dtype:
                raise ValueError(
                    f"{weights.directory}: {name} is {kind}, other parts of Megatron's {part.key} are {first.dtype}; "
                    "name one type with --dtype"
                )
    return out


def _pieces(found: list[Part], entries: Mapping[str, Entry]) -> dict[Chunk, tuple[Part, int, int]]:
    """Return what is written at once, in order, and the rows of a part that each of it is."""
    out = {}
    for part in found:
        lead = () if part.layer is None else (part.layer,)
        for start, stop in row_ranges(Entry(part.key, part.shape, entries[part.key].dtype), _PIECE_BYTES):
            out[Chunk.rows(part.key, lead, start, stop, part.shape[1:])] = (part, start, stop)
    return out


def _part_rows(weights: HfWeights, part: Part, start: int, stop: int) -> torch.Tensor:
    rows, offset = [], 0
    for name, first, last in part.blocks:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            rows.append(weights.rows(str(name), first + low - offset, first + high - offset))
        offset += last - first
    return rows[0] if len(rows) == 1 else torch.cat(rows)
