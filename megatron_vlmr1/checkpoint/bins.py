"""Checkpoints in torch's pickles, ``pytorch_model*.bin``, to safetensors, without running code that a pickle names."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_vlmr1.checkpoint import release
from megatron_vlmr1.checkpoint.partial import check_new
from megatron_vlmr1.checkpoint.release import Progress
from megatron_vlmr1.checkpoint.tensorfile import DTYPES, Entry, row_ranges
from megatron_vlmr1.checkpoint.weights import check_tensors
from megatron_vlmr1.checkpoint.writer import MAX_SHARD_BYTES
from megatron_vlmr1.models import families

_INDEX = "pytorch_model.bin.index.json"


def bins_to_safetensors(source: Path, out: Path, progress: Progress = lambda done, total: None) -> Path:
    """Make a Hugging Face directory with safetensors of one with ``pytorch_model*.bin``.

    An interrupted one goes on where it stopped.

    Args:
        source: directory with config.json.
        out: new directory.
        progress: told of every piece.

    Raises:
        ValueError: `out` exists, a file is missing, damaged, hostile or of another model, or the disk is too small.
        OSError: the disk failed; nothing was published.
    """
    check_new(out, source)
    shape = families.read_shape(source)
    weights = BinWeights(source)
    check_tensors(source, {name: weights.entry(name).shape for name in weights.names()}, shape)
    return release.publish(weights, source, out, None, MAX_SHARD_BYTES, {}, progress)


class BinWeights:
    """The tensors of a directory's pickles under their published names (a `release.Source`)."""

    def __init__(self, directory: Path) -> None:
        """Look what they hold.

        Raises:
            ValueError: a file is missing, damaged, hostile, or holds anything but tensors by name.
        """
        self.directory = directory
        self._files = _files(directory)
        self._entries: dict[str, Entry] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        aliases = families.aliases(directory)
        for path in self._files:
            for stored, tensor in _load(path).items():
                name = families.published_name(stored, aliases)
                self._where[name] = (path, stored)
                self._entries[name] = Entry(name, tuple(tensor.shape), tensor.dtype)

    def names(self) -> set[str]:
        """Return the published names of all tensors."""
        return set(self._entries)

    def entry(self, name: str, dtype: torch.dtype | None = None) -> Entry:
        """Return a tensor's name, shape and type; `dtype` in place of its own."""
        found = self._entries[name]
        return found if dtype is None else replace(found, dtype=dtype)

    def pieces(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        """Read a tensor in pieces of at most so many bytes (or one row), cut along its first dimension.

        The file is mapped anew for each tensor: what is read through a mapping counts as this process's memory until
        the mapping is gone.
        """
        path, stored = self._where[name]
        found = _load(path)[stored].detach()
        for start, stop in row_ranges(self.entry(name), nbytes):
            yield found[start:stop] if found.dim() else found

    def files(self) -> list[Path]:
        """Return the pickles."""
        return self._files


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [directory / Path(name).name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: not an index of weights ({error!r})") from error
    else:
        paths = sorted(directory.glob("pytorch_model*.bin")) or [directory / "pytorch_model.bin"]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: not found")
    return paths


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Map a file's tensors into memory."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: damaged, or not a file that torch.save makes since version 1.6")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of that message advises to run the file's code
        why = f"asks for {asked[1]}, which no tensor needs" if asked else f"damaged: {str(error).partition('. ')[0]}"
        raise ValueError(f"{path}: refused without running its code: {' '.join(why.split())[:200]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, not tensors by name")
    for name, tensor in found.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise ValueError(f"{path}: {str(name)[:80]!r} is {type(tensor).__name__}, not a plain tensor under a name")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{path}: {name} is of type {tensor.dtype}; known: {', '.join(sorted(DTYPES))}")
    return found
