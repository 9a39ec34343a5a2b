"""Ranks' slices to a Hugging Face directory: each pipeline stage gathers and writes its own shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megatron_vlmr1.checkpoint.background import Writes
from megatron_vlmr1.checkpoint.staging import Staging
from megatron_vlmr1.checkpoint.tensorfile import Entry, as_bytes, header
from megatron_vlmr1.checkpoint.weights import HfWeights, parameter_pieces
from megatron_vlmr1.models import families
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.models.vlm import VlmModel
from megatron_vlmr1.runtime import distributed
from megatron_vlmr1.telemetry.progress import mark

MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.bin.index.json", _INDEX)


def save(chunks: Sequence[VlmModel], source: Path, target: Path) -> None:
    """Write the model as a Hugging Face directory: weights as they are in memory, other files as in `source`.

    A rank whose disk fails goes on with the collectives, so that no other rank waits for it, and raises at the end.

    Called by all ranks; the first copy of the model (data-parallel rank 0) writes. Layout-independent.

    Args:
        chunks: this rank's part of the model.
        source: the Hugging Face directory that training started from: config, tokenizer and processor files.
        target: an empty directory on a file system that all ranks share.

    Raises:
        OSError: some rank could not write; raised on every rank.
    """
    writes = Writes(target, later=False)
    stage(chunks, source, target, writes, None)
    problem, _ = writes.wait()
    distributed.agree(problem)
    distributed.together(lambda: finish(target, chunks[0].shape), only_first=True)


@torch.no_grad()
def stage(chunks: Sequence[VlmModel], source: Path, target: Path, writes: Writes, staging: Staging | None) -> None:
    """Gather what `save` writes, and add each rank's part to `writes`; all ranks call it, then the first one `finish`.

    Args:
        chunks: this rank's part of the model.
        source: the Hugging Face directory of config, tokenizer and processor files.
        target: an empty directory on a file system that all ranks share.
        writes: takes what this rank writes.
        staging: memory for the whole of it; None gathers it a shard at a time, for writes that are done at once.
    """
    mesh = chunks[0].mesh
    if mesh.rank == 0:
        writes.add(partial(_write_side_files, source, target, chunks[0].dtype))
    if mesh.dp_rank == 0:
        _stage_weights(chunks, target, writes, staging)


def finish(target: Path, shape: VlmShape) -> dict[str, str]:
    """Name the shards and write their index, once all ranks have written; the first rank calls it.

    Returns:
        The names that shards had, and those that they have now.

    Raises:
        OSError: the disk failed, or a shard is not whole.
    """
    try:
        renamed = _name_shards(target)
        HfWeights(target).check(shape)
    except (ValueError, SafetensorError) as error:
        raise OSError(str(error)) from error
    return renamed


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything in a Hugging Face directory but its weights and hidden folders."""
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            ignored = shutil.ignore_patterns(*_WEIGHTS)
            shutil.copytree(entry, target / entry.name, dirs_exist_ok=True, ignore=ignored)
        elif entry.is_file() and not any(entry.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(entry, target / entry.name)


def name_dtype(target: Path, dtype: torch.dtype) -> None:
    """Let config.json say the type that the weights have now."""
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key, name) != name:
        path.write_text(json.dumps({**config, key: name}, indent=2) + "\n", encoding="utf-8")


def _write_side_files(source: Path, target: Path, dtype: torch.dtype) -> list[Path]:
    copy_side_files(source, target)
    name_dtype(target, dtype)
    return [path for path in target.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def _stage_weights(chunks: Sequence[VlmModel], target: Path, writes: Writes, staging: Staging | None) -> None:
    """Add this stage's shards to `writes`, a new one whenever one is full; all ranks of the stage call it."""
    shard: dict[str, torch.Tensor] = {}
    size = number = 0

    def add_shard() -> None:
        file = target / f"stage-{chunks[0].mesh.pp_rank:05d}-{number:05d}.safetensors"
        writes.add(partial(_write_shard, file, shard))

    for name, tensor in (found for chunk in chunks for found in _whole_tensors(chunk, staging)):
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            add_shard()
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        add_shard()


def _write_shard(file: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    """Write a safetensors file; not by safetensors' own means, which copy all of it and let no other thread run."""
    with file.open("xb") as out:
        out.write(header([Entry(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]))
        for tensor in tensors.values():
            out.write(as_bytes(tensor))
            mark()
    return [file]


def _whole_tensors(model: VlmModel, staging: Staging | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a chunk's tensors under their published names, on the stage's first tensor-parallel rank only.

    Every Hugging Face tensor lies within one parameter, so it is whole once that parameter is gathered.
    """
    mesh, sizes = model.mesh, families.of(model.shape).tensor_shapes(model.shape)
    for _, parameter, pieces in parameter_pieces(model):
        split = mesh.tp_size > 1 and pieces[0] != pieces[1]
        parts = _gather(parameter.detach(), model) if split else [parameter.detach()]
        whole: dict[str, torch.Tensor] = {}
        for part, rank_pieces in zip(parts, pieces, strict=False):  # unsplit: one part stands for all ranks
            start = 0
            for piece in rank_pieces:
                length = piece.stop - piece.start
                if piece.name is not None:
                    if piece.name not in whole:
                        whole[piece.name] = _empty(piece.name, sizes[piece.name], model.dtype, staging)
                    window = whole[piece.name].narrow(piece.dim, piece.start, length)
                    window.copy_(part.narrow(piece.dim, start, length))
                start += length
        # A tied model's last chunk holds a second copy of the embedding, which the first chunk writes.
        second_copy = model.shape.text.tied and not model.pre_process and "model.embed_tokens.weight" in whole
        if mesh.tp_rank == 0 and not second_copy:
            yield from whole.items()


def _empty(name: str, shape: Sequence[int], dtype: torch.dtype, staging: Staging | None) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype) if staging is None else staging.empty(f"hf {name}", shape, dtype)


def _gather(local: torch.Tensor, model: VlmModel) -> list[torch.Tensor]:
    """Return all ranks' parts of a parameter on the first rank of the tensor-parallel group, nothing elsewhere."""
    mesh = model.mesh
    parts = [torch.empty_like(local) for _ in range(mesh.tp_size)] if mesh.tp_rank == 0 else None
    dist.gather(local.contiguous(), parts, dst=dist.get_global_rank(mesh.tp_group, 0), group=mesh.tp_group)
    return parts or []


def _name_shards(target: Path) -> dict[str, str]:
    """Give the stages' files their published names, and write the index where there are several."""
    files = sorted(target.glob("stage-*.safetensors"))
    renamed = {file.name: shard_name(i, len(files)) for i, file in enumerate(files, start=1)}
    for old, new in renamed.items():
        (target / old).rename(target / new)
    if len(files) > 1:
        write_index(target)
    return renamed


def shard_name(number: int, count: int) -> str:
    """Return the published name of shard `number`, counted from 1, of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(target: Path) -> None:
    """Write the index of a directory's shards, from what is in them."""
    where: dict[str, str] = {}
    total = 0
    for file in sorted(target.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file.name)
        total += _data_bytes(file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _data_bytes(file: Path) -> int:
    """Bytes of tensor data in a safetensors file: all but the header and its length (8 bytes, little-endian)."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header
