"""Between Hugging Face directories and checkpoints, and proofs that nothing was lost."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_vlmr1.checkpoint import store, weights, writer
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.checkpoint.partial import check_new, need_space, room
from megatron_vlmr1.checkpoint.tensorfile import as_bytes
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.config import ParallelConfig, RecomputeConfig
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.vlm import build_chunks
from megatron_vlmr1.parallel.job import joined
from megatron_vlmr1.runtime import device, distributed

_PIECE = 1 << 23  # numbers that are compared at once


def roundtrip(source: Path, out: Path, layout: ParallelConfig, precision: str) -> None:
    """Load on all ranks of a layout and save through the checkpoint writer; called by each rank.

    Raises:
        ValueError: the source or the layout does not fit, or the disk fills up.
        OSError: the disk failed. Either way there is no `out`, and nothing of it beside.
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

        def publish() -> None:
            store.flush_tree(temporary)
            temporary.rename(out)

        try:
            with room(out):
                writer.save(chunks, directory, temporary)
                distributed.together(publish, only_first=True)
        except (OSError, ValueError):
            if mesh.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_roundtrip(source: Path, out: Path, precision: str) -> None:
    """Look before any rank is started whether a model can be loaded, and written to `out`.

    Raises:
        ValueError: it cannot.
    """
    directory = hf_directory(source, check=False)  # the first rank compares it with its manifest
    check_new(out, directory)
    hf = weights.HfWeights(directory)
    hf.check(read_shape(directory))
    place = next(path for path in out.absolute().parents if path.exists())
    if not place.is_dir():
        raise ValueError(f"{place}: not a directory")
    need_space(place, sum(hf.entry(name, device.DTYPES[precision]).nbytes for name in hf.names()))


def differences(left: Path, right: Path) -> list[str]:
    """Compare the tensors of two directories: one line for each that is missing, misshapen or different.

    Raises:
        ValueError: one of them holds no model.
    """
    a, b = (weights.HfWeights(hf_directory(path)) for path in (left, right))
    out = [f"{name}: only in {left}" for name in sorted(a.names() - b.names())]
    out += [f"{name}: only in {right}" for name in sorted(b.names() - a.names())]
    out += [line for name in sorted(a.names() & b.names()) if (line := _difference(a, b, name))]
    return out


def _difference(a: HfWeights, b: HfWeights, name: str) -> str:
    """Return how a tensor differs, nothing if it does not; in pieces of bounded size."""
    x, y = a.entry(name), b.entry(name)
    if x.shape != y.shape:
        return f"{name}: {list(x.shape)} {x.dtype} against {list(y.shape)} {y.dtype}"
    same, largest = True, 0.0
    pieces = (side.pieces(name, _PIECE * entry.dtype.itemsize) for side, entry in ((a, x), (b, y)))
    for p, q in zip(*pieces, strict=True):
        if x.dtype == y.dtype and np.array_equal(as_bytes(p), as_bytes(q)):
            continue
        same = False
        largest = max(largest, float((p.double() - q.double()).abs().max()), key=lambda v: (v != v, v))
    if same:
        return ""
    types = f"{x.dtype} against {y.dtype}, " if x.dtype != y.dtype else ""
    return f"{name}: {types}largest difference {largest:.3g}"
