"""Between Hugging Face directories and checkpoints, and proofs that nothing was lost."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vlmr1.checkpoint import store, weights, writer
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.config import ParallelConfig, RecomputeConfig
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.vlm import build_chunks
from megatron_vlmr1.parallel.job import joined
from megatron_vlmr1.runtime import device, distributed


def roundtrip(source: Path, out: Path, layout: ParallelConfig, precision: str) -> None:
    """Load on all ranks of a layout and save through the checkpoint writer; called by each rank.

    Raises:
        ValueError: the source or the layout does not fit.
    """
    with joined(layout, seed=0) as mesh:
        directory = hf_directory(source, check=mesh.rank == 0)
        shape = read_shape(directory)
        chunks = build_chunks(shape, mesh, device.DTYPES[precision], RecomputeConfig())
        weights.load(chunks, weights.HfWeights(directory))
        name = distributed.broadcast_text(f"{out.name}.tmp-{secrets.token_hex(4)}")
        temporary = out.with_name(name)
        if mesh.rank == 0:
            temporary.mkdir(parents=True)
        dist.barrier()
        writer.save(chunks, directory, temporary)
        if mesh.rank == 0:
            store.flush_tree(temporary)
            temporary.rename(out)


def differences(left: Path, right: Path) -> list[str]:
    """Compare the tensors of two directories: one line for each that is missing, misshapen or different.

    Raises:
        ValueError: one of them holds no model.
    """
    a, b = (weights.HfWeights(hf_directory(path)) for path in (left, right))
    out = [f"{name}: only in {left}" for name in sorted(a.names() - b.names())]
    out += [f"{name}: only in {right}" for name in sorted(b.names() - a.names())]
    for name in sorted(a.names() & b.names()):
        x, y = a.tensor(name), b.tensor(name)
        if x.shape != y.shape or x.dtype != y.dtype:
            out.append(f"{name}: {list(x.shape)} {x.dtype} against {list(y.shape)} {y.dtype}")
        elif not torch.equal(x, y):
            out.append(f"{name}: largest difference {(x.double() - y.double()).abs().max():.3g}")
    return out
