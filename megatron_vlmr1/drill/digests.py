"""What a run left, as digests that two runs can be compared by: logical tensors, generators, cursor, rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vlmr1.checkpoint.pickles import guarded
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.drill.jobs import need

Tensors = dict[str, torch.Tensor]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where a run's checkpoint is."""
    return run_dir / "checkpoints" / f"step_{step}"


def weights(checkpoint: Path) -> Tensors:
    """Return the logical tensors of the model: whole, under their Hugging Face names."""
    found = HfWeights(checkpoint / "hf")
    return {name: found.tensor(name) for name in found.names()}


def optimizer(checkpoint: Path) -> Tensors:
    """Return the logical tensors of the optimizer: whole, under megatron-core's names."""
    directory = checkpoint / "state" / "optimizer"
    with guarded(directory):
        reader = torch_checkpoint.FileSystemReader(str(directory))
        listed = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in listed.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
        common = torch.load(directory / "common.pt", weights_only=True)
    text = json.dumps(common, sort_keys=True, default=str).encode()
    return {**tensors, "common": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a sha256 over names, types, shapes and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def state(run_dir: Path, step: int) -> dict[str, str]:
    """Return digests of a checkpoint: parameters, optimizer, the generators of each rank, sample cursor, rewards.

    Rewards are the bytes of the run's samples so far: completions, scores and their parts.
    """
    path = checkpoint_path(run_dir, step)
    progress = json.loads((path / "state" / "progress.json").read_text())
    generators = {file.stem: digest(load_file(file)) for file in sorted((path / "state").glob("rng_*.safetensors"))}
    samples = b"".join((run_dir / "samples" / f"step_{i}.jsonl").read_bytes() for i in range(step))
    return {
        "parameters": digest(weights(path)),
        "optimizer": digest(optimizer(path)),
        **generators,
        "sample cursor": json.dumps([progress["step"], progress["consumed_samples"], progress["skipped"]]),
        "rewards": hashlib.sha256(samples).hexdigest(),
    }


def same(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """Return how many digests are the same.

    Raises:
        Missed: some differ; names them.
    """
    unlike = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    need(not unlike, f"other bits than the uninterrupted run: {', '.join(unlike)}")
    return f"{len(expected)}/{len(expected)} digests identical"
