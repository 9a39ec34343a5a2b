"""A `torch_dist` directory read as what it means: tensors under their published names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_vlmr1.checkpoint.tensorfile import DTYPES, Entry, row_ranges
from megatron_vlmr1.checkpoint.torch_dist_files import Chunk, Reader
from megatron_vlmr1.checkpoint.torch_dist_names import EMBEDDING, LANGUAGE_PREFIX, Part, parts
from megatron_vlmr1.models import families
from megatron_vlmr1.models.shape import VlmShape


class _Span(NamedTuple):
    """Rows of a published tensor, and where they lie."""

    start: int
    stop: int
    key: str
    lead: tuple[int, ...]  # the layer, where layers are stacked
    row: int  # of `start`


class MegatronWeights:
    """The tensors of a `torch_dist` directory under their published names."""

    def __init__(self, directory: Path, shape: VlmShape) -> None:
        """Find every tensor of a model.

        Raises:
            ValueError: hostile or damaged metadata; or a missing, unexpected or misshapen tensor.
        """
        self.directory = directory
        self._reader = Reader(directory)
        self._sizes = families.of(shape).tensor_shapes(shape)
        self._spans: dict[str, list[_Span]] = {name: [] for name in self._sizes}
        used: set[str] = set()
        for part in parts(shape, _prefix(self._reader)):
            keys, lead = self._locate(part, shape.text.num_layers)
            used |= set(keys)
            each, offset = part.shape[0] // len(keys), 0
            for name, start, stop in part.blocks:
                span = _Span(start, stop, keys[offset // each], lead, offset % each)
                self._spans[str(name)].append(span)
                offset += stop - start
        if extra := {key for key in self._reader.tensors.keys() - used if not key.endswith("_extra_state")}:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise ValueError(f"{directory}: has unexpected tensor {min(extra)}{more}; config.json says {shape.family}")

    def names(self) -> set[str]:
        """Return the published names of all tensors."""
        return set(self._spans)

    def entry(self, name: str, dtype: torch.dtype | None = None) -> Entry:
        """Return a tensor's name, shape and type; `dtype` in place of its own.

        Raises:
            ValueError: it is of a type that has no place in a Hugging Face directory.
        """
        found = {self._reader.tensors[span.key].dtype for span in self._spans[name]}
        if len(found) > 1 or not found <= set(DTYPES.values()):
            kinds, known = (", ".join(sorted(map(str, some))) for some in (found, DTYPES.values()))
            raise ValueError(f"{self.directory}: {self._spans[name][0].key} is of type {kinds}; known: {known}")
        return Entry(name, self._sizes[name], dtype or found.pop())

    def pieces(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        """Read a tensor in pieces of at most so many bytes (or one row), cut along its first dimension.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        rest = self._sizes[name][1:]
        for start, stop in row_ranges(self.entry(name), nbytes):
            rows = []
            for span in self._spans[name]:
                low, high = max(start, span.start), min(stop, span.stop)
                if low < high:
                    row = span.row - span.start
                    values = self._reader.read(Chunk.rows(span.key, span.lead, row + low, row + high, rest))
                    rows.append(values.view(high - low, *rest))
            yield rows[0] if len(rows) == 1 else torch.cat(rows)

    def files(self) -> list[Path]:
        """Return the files that hold the tensors, and their metadata."""
        return [self.directory / ".metadata", *self._reader.files()]

    def _locate(self, part: Part, layers: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the keys that hold a part, each an equal share of its rows, and the layer's index in them."""
        tensors = self._reader.tensors
        place = next((place for place in part.places() if all(key in tensors for key in place[0])), None)
        if place is None:
            layer = "" if part.layer is None else f" (layer {part.layer})"
            raise ValueError(f"{self.directory}: lacks tensor {part.key}{layer}")
        keys, lead = place
        for key in keys:
            found, rows = tensors[key].size, part.shape[0] // len(keys)
            if part.vocabulary and found:
                rows = max(rows, found[0])
            if found != (expected := (*(layers for _ in lead), rows, *part.shape[1:])):
                raise ValueError(f"{self.directory}: {key} is {list(found)}, but config.json asks for {list(expected)}")
        return place


def _prefix(reader: Reader) -> str:
    """Return what precedes the language model's keys.

    Raises:
        ValueError: something else than we know.
    """
    for prefix in (LANGUAGE_PREFIX, ""):
        if prefix + EMBEDDING in reader.tensors:
            return prefix
    some = ", ".join(sorted(reader.tensors)[:3]) or "none"
    raise ValueError(f"{reader.directory}: no tensor {LANGUAGE_PREFIX}{EMBEDDING} or {EMBEDDING}; found {some} …")
