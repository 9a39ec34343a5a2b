"""From what a user names to the Hugging Face directory that holds the weights."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import megatron_vlmr1
from megatron_vlmr1.checkpoint import store
from megatron_vlmr1.checkpoint.hashing import sha256

_ASSET = "asset:"
_HASH_THREADS = min(8, os.cpu_count() or 1)


def hf_directory(path: str | Path, check: bool = True) -> Path:
    """Return the Hugging Face directory in `path`: itself, a checkpoint ``step_N``, or a run with checkpoints.

    ``asset:NAME`` is a model that came with the package.

    Args:
        path: what the user named.
        check: compare a checkpoint with its manifest before it is used; one rank of a job is enough.

    Raises:
        ValueError: there is none, or the checkpoint is damaged.
    """
    if str(path).startswith(_ASSET):
        return _shipped(str(path).removeprefix(_ASSET))
    root = Path(path)
    for candidate in (root, root / "checkpoints" / store.LATEST, root / store.LATEST):
        if (candidate / "config.json").is_file():
            return candidate
        if (candidate / "hf" / "config.json").is_file():
            problems = store.verify(candidate) if check else []
            if problems:
                raise ValueError(f"{candidate}: damaged checkpoint: {problems[0]}")
            return (candidate / "hf").resolve()
    what = "no model in it" if root.is_dir() else "no such directory"
    if (root / ".metadata").is_file() or (root / "latest_checkpointed_iteration.txt").is_file():
        what = f"a Megatron checkpoint, of which `vlmr1 convert import {root} OUT` makes a Hugging Face directory"
    raise ValueError(f"{root}: {what}; expected a Hugging Face directory, a checkpoint step_N or a run directory")


def weights_sha256(directory: Path) -> str:
    """Return one sha256 over a Hugging Face directory's weight files, in order of their names."""
    total = hashlib.sha256()
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for digest in pool.map(sha256, sorted(directory.glob("*.safetensors"))):
            total.update(digest)
    return total.hexdigest()


def _shipped(name: str) -> Path:
    assets = Path(megatron_vlmr1.__file__).parent / "assets"
    known = sorted(entry.name for entry in assets.iterdir() if (entry / "config.json").is_file())
    if name not in known:
        raise ValueError(f"{_ASSET}{name}: no such model came with the package; known: {', '.join(known) or 'none'}")
    return assets / name
