"""Ranks' slices to a Hugging Face directory: each pipeline stage gathers and writes its own shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_vlmr1.checkpoint.weights import HfWeights, parameter_pieces
from megatron_vlmr1.models import families
from megatron_vlmr1.models.vlm import VlmModel
from megatron_vlmr1.runtime import distributed

MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.bin.index.json", _INDEX)


@torch.no_grad()
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
    first = chunks[0]
    problem = _write_stage(chunks, target) if first.mesh.dp_rank == 0 else ""
    distributed.agree(problem)
    if first.mesh.rank == 0:
        try:
            copy_side_files(source, target)
            name_dtype(target, first.dtype)
            _name_shards(target)
            HfWeights(target).check(first.shape)
        except (OSError, ValueError, SafetensorError) as error:
            problem = str(error)
    distributed.agree(problem)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything in a Hugging Face directory but its weights and hidden folders."""
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
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


def _write_stage(chunks: Sequence[VlmModel], target: Path) -> str:
    """Write this stage's tensors, a new file whenever one is full; all ranks of the stage call it.

    Returns:
        What went wrong on this rank, or nothing.
    """
    shard: dict[str, torch.Tensor] = {}
    size = number = 0
    problem = ""

    def flush() -> str:
        file = target / f"stage-{chunks[0].mesh.pp_rank:05d}-{number:05d}.safetensors"
        try:
            save_file(shard, file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            return f"{file}: {error}"
        return ""

    for name, tensor in (found for chunk in chunks for found in _whole_tensors(chunk)):
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            problem = problem or flush()
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor
        size += tensor.nbytes
    return (problem or flush()) if shard else problem


def _whole_tensors(model: VlmModel) -> Iterator[tuple[str, torch.Tensor]]:
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
                        whole[piece.name] = torch.empty(sizes[piece.name], dtype=model.dtype)
                    window = whole[piece.name].narrow(piece.dim, piece.start, length)
                    window.copy_(part.narrow(piece.dim, start, length))
                start += length
        # A tied model's last chunk holds a second copy of the embedding, which the first chunk writes.
        second_copy = model.shape.text.tied and not model.pre_process and "model.embed_tokens.weight" in whole
        if mesh.tp_rank == 0 and not second_copy:
            yield from whole.items()


def _gather(local: torch.Tensor, model: VlmModel) -> list[torch.Tensor]:
    """Return all ranks' parts of a parameter on the first rank of the tensor-parallel group, nothing elsewhere."""
    mesh = model.mesh
    parts = [torch.empty_like(local) for _ in range(mesh.tp_size)] if mesh.tp_rank == 0 else None
    dist.gather(local.contiguous(), parts, dst=dist.get_global_rank(mesh.tp_group, 0), group=mesh.tp_group)
    return parts or []


def _name_shards(target: Path) -> None:
    """Give the stages' files their published names, and write the index where there are several."""
    files = sorted(target.glob("stage-*.safetensors"))
    for file in files:
        file.chmod(0o644)  # safetensors makes files that only their owner may read
    for i, file in enumerate(files, start=1):
        file.rename(target / shard_name(i, len(files)))
    if len(files) > 1:
        write_index(target)


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
