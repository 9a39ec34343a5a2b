"""Which rank of a layout holds which part of every Hugging Face tensor, told by the model's own modules.

Every rank's modules are built without memory, so that the real sizes can be looked at on any machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_vlmr1.checkpoint.weights import parameter_pieces
from megatron_vlmr1.config import ParallelConfig, RecomputeConfig
from megatron_vlmr1.models import families
from megatron_vlmr1.models.pieces import Piece
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.models.vlm import VlmModel, build_chunks
from megatron_vlmr1.parallel import mesh as meshes
from megatron_vlmr1.runtime import device


@dataclass(frozen=True)
class Holding:
    """A part of a Hugging Face tensor on one rank of a copy of the model."""

    piece: Piece
    rank: int
    parameter: str  # Megatron's name
    layer: int | None  # of the language model
    replica: bool  # another rank, or another stage of a tied model, writes it


@dataclass(frozen=True)
class Coverage:
    """What every rank of a copy of the model holds."""

    holdings: list[Holding]
    rank_parameters: list[int]  # of each rank: numbers, padding included


def cover(shape: VlmShape, layout: ParallelConfig) -> Coverage:
    """Build every rank's modules and list what they hold.

    Raises:
        ValueError: the model cannot be cut in this layout; says which ones are near.
    """
    shape.check_layout(layout)
    device.prepare_megatron()
    holdings: list[Holding] = []
    sizes: list[int] = []
    with meshes.pretending():
        for stage in range(layout.pipeline_model_parallel_size):
            for tp_rank in range(layout.tensor_model_parallel_size):
                chunks = _build(shape, layout, tp_rank, stage)
                holdings += [found for chunk in chunks for found in _holdings(chunk)]
                sizes.append(sum(p.numel() for chunk in chunks for p in chunk.parameters()))
    _check(shape, holdings)
    return Coverage(holdings, sizes)


def _build(shape: VlmShape, layout: ParallelConfig, tp_rank: int, stage: int) -> list[VlmModel]:
    mesh = meshes.pretended(layout, tp_rank, stage)
    with device.without_memory(), meshes.building_for(mesh):
        return build_chunks(shape, mesh, torch.bfloat16, RecomputeConfig())


def _holdings(model: VlmModel) -> Iterator[Holding]:
    mesh = model.mesh
    for name, parameter, pieces in parameter_pieces(model):
        own = pieces[mesh.tp_rank]
        assert parameter.shape[own[0].dim] == sum(p.stop - p.start for p in own), (name, parameter.shape, own)
        copies = mesh.tp_size > 1 and pieces[0] == pieces[1]
        tied_again = model.shape.text.tied and not model.pre_process and name == "output_layer.weight"
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        for piece in own:
            yield Holding(piece, mesh.rank, name, layer, (copies and mesh.tp_rank > 0) or tied_again)


def _check(shape: VlmShape, holdings: Sequence[Holding]) -> None:
    """Every number of every tensor is written by exactly one rank."""
    parts: Mapping[str, list[Piece]] = defaultdict(list)
    for held in holdings:
        if held.piece.name is not None and not held.replica:
            parts[held.piece.name].append(held.piece)
    sizes = families.of(shape).tensor_shapes(shape)
    assert parts.keys() == sizes.keys(), parts.keys() ^ sizes.keys()
    for name, pieces in parts.items():
        (dim,) = {piece.dim for piece in pieces}
        end = 0
        for piece in sorted(pieces, key=lambda piece: piece.start):
            assert piece.start == end, (name, pieces)
            end = piece.stop
        assert end == sizes[name][dim], (name, pieces)
