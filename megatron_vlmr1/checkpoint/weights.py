"""Hugging Face tensors and ranks' slices of them, both ways, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megatron_vlmr1.checkpoint.tensorfile import DTYPES, Entry, data_offset, read, row_ranges
from megatron_vlmr1.models import families
from megatron_vlmr1.models.pieces import Piece, spec_free
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.models.vlm import VlmModel
from megatron_vlmr1.telemetry.progress import mark


class HfWeights:
    """The tensors of a Hugging Face directory under their published names, read slice by slice."""

    def __init__(self, directory: Path) -> None:
        """Open the directory's safetensors.

        Raises:
            ValueError: no safetensors (a pickle checkpoint is refused), a missing or damaged shard.
        """
        self.directory = directory
        self._files: dict[str, Any] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._offsets: dict[Path, dict[str, int]] = {}
        aliases = families.aliases(directory)
        for path in _shards(directory):
            try:
                handle = safe_open(path, framework="pt")
                names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
            self._files[str(path)] = handle
            for name in names:
                self._where[families.published_name(name, aliases)] = (path, name)

    def names(self) -> set[str]:
        """Return the published names of all tensors."""
        return set(self._where)

    def check(self, shape: VlmShape) -> None:
        """Compare with what the architecture needs.

        Raises:
            ValueError: naming a missing, unexpected or misshapen tensor.
        """
        check_tensors(self.directory, {name: tuple(self._slice(name).get_shape()) for name in self._where}, shape)

    def read(self, piece: Piece, like: torch.Tensor) -> torch.Tensor:
        """Read one piece; a nameless one is zeros shaped after `like`'s other dimensions."""
        if piece.name is None:
            size = list(like.shape)
            size[piece.dim] = piece.stop - piece.start
            return torch.zeros(size, dtype=like.dtype)
        source = self._slice(piece.name)
        window = slice(piece.start, piece.stop)
        return source[:, window] if piece.dim == 1 else source[window]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one whole tensor."""
        path, stored = self._where[name]
        return self._files[str(path)].get_tensor(stored)

    def pieces(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        """Read one tensor in pieces of at most so many bytes (or one row), cut along its first dimension."""
        entry = self.entry(name)
        for start, stop in row_ranges(entry, nbytes):
            yield self.rows(name, start, stop) if entry.shape else self.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read some rows of a tensor into memory.

        Raises:
            OSError: the disk failed, or the file has become shorter.
        """
        path, stored = self._where[name]
        if path not in self._offsets:
            self._offsets[path] = data_offset(path)
        entry = self.entry(name)
        row = entry.nbytes // max(1, entry.shape[0])
        return read(path, self._offsets[path][stored] + start * row, (stop - start, *entry.shape[1:]), entry.dtype)

    def entry(self, name: str, dtype: torch.dtype | None = None) -> Entry:
        """Return a tensor's name, shape and type; `dtype` in place of its own."""
        found = self._slice(name)
        if (kind := found.get_dtype()) not in DTYPES:
            raise ValueError(f"{self._where[name][0]}: {name} is of type {kind}; known: {', '.join(sorted(DTYPES))}")
        return Entry(name, tuple(found.get_shape()), dtype or DTYPES[kind])

    def files(self) -> list[Path]:
        """Return the paths of the shards."""
        return [Path(path) for path in self._files]

    def _slice(self, name: str) -> Any:
        path, stored = self._where[name]
        return self._files[str(path)].get_slice(stored)


def check_tensors(directory: Path, found: Mapping[str, tuple[int, ...]], shape: VlmShape) -> None:
    """Compare tensors, by their shapes, with what the architecture needs.

    Raises:
        ValueError: naming a missing, unexpected or misshapen tensor.
    """
    expected = families.of(shape).tensor_shapes(shape)
    extra = found.keys() - expected.keys() - ({"lm_head.weight"} if shape.text.tied else set())
    missing = expected.keys() - found.keys()
    for what, names in (("lacks", missing), ("has unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{directory}: {what} tensor {min(names)}{more}; config.json says {shape.family}")
    for name, size in expected.items():
        if found[name] != size:
            raise ValueError(f"{directory}: {name} is {list(found[name])}, but config.json asks for {list(size)}")


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r})") from error
        paths = [directory / Path(str(name)).name for name in files]
    else:
        paths = [directory / "model.safetensors"]
    for path in paths:
        if not path.is_file():
            pickled = sorted(directory.glob("pytorch_model*.bin"))
            way = f"`vlmr1 convert safetensors {directory} OUT` makes safetensors of it without running its code"
            raise ValueError(f"{path}: not found" + (f"; {pickled[0].name} is a pickle: {way}" if pickled else ""))
    return paths


class Part(NamedTuple):
    """One parameter of a chunk, and what it is made of."""

    name: str  # Megatron's, with the layer's number in the whole model; the same of both layer specs
    parameter: torch.nn.Parameter
    pieces: list[list[Piece]]  # of each tensor-parallel rank


def parameter_pieces(model: VlmModel) -> Iterator[Part]:
    """Yield every parameter of this chunk, in a fixed order."""
    shape, mesh, family = model.shape, model.mesh, families.of(model.shape)
    if model.vision is not None:
        sizes = family.vision_shapes(shape.vision)
        for name, parameter in model.vision.named_parameters():
            mark()
            whole = [Piece(family.VISION_PREFIX + name, 0, 0, sizes[name][0])]
            yield Part(f"vision.{name}", parameter, [whole] * mesh.tp_size)
    for name, parameter in model.language.named_parameters():
        mark()
        layer, inner = None, name
        if name.startswith("decoder.layers."):
            _, _, local, inner = name.split(".", 3)
            layer = model.language.decoder.layers[int(local)].layer_number - 1
            inner = spec_free(inner)
            name = f"decoder.layers.{layer}.{inner}"
        pieces = [family.text_pieces(shape, inner, layer, rank, mesh.tp_size) for rank in range(mesh.tp_size)]
        yield Part(name, parameter, pieces)


@torch.no_grad()
def load(chunks: Sequence[VlmModel], weights: HfWeights) -> None:
    """Fill this rank's parameters from a Hugging Face directory, casting to their type.

    Raises:
        ValueError: the directory does not hold this model.
    """
    weights.check(chunks[0].shape)
    for _, parameter, pieces in (part for chunk in chunks for part in parameter_pieces(chunk)):
        start = 0
        for piece in pieces[chunks[0].mesh.tp_rank]:
            part = weights.read(piece, parameter)
            dim = piece.dim
            parameter.narrow(dim, start, part.shape[dim]).copy_(part)
            start += part.shape[dim]
        assert start == parameter.shape[dim]
