"""Groups change hands between data-parallel ranks, so that each rank of the update has about as much to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from megatron_vlmr1.data.bins import destinations
from megatron_vlmr1.data.codec import from_bytes, to_bytes
from megatron_vlmr1.data.packing import PackedGroup
from megatron_vlmr1.parallel.exchange import exchange_bytes, gather_numbers
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.types import Group

Item = TypeVar("Item", Group, PackedGroup)


def balanced(items: Sequence[Item], costs: Sequence[int], mesh: Mesh) -> list[Item]:
    """Return this data-parallel rank's items after the exchange; all ranks of the world call it.

    Every rank works out the same assignment from everybody's costs, and only what moves is sent. The ranks of one copy
    of the model get the same items in the same order, since each exchanges with its own like; stages behind the first
    send no pixels, as they need none.

    Args:
        items: this rank's, the same on all ranks of its copy of the model.
        costs: of each item, in any unit; an item that costs nothing stays.
        mesh: the ranks.
    """
    if mesh.dp_size == 1:
        return list(items)
    table = destinations(gather_numbers(costs, mesh.dp_group))
    assert len(table[mesh.dp_rank]) == len(items)
    if all(to == rank for rank, row in enumerate(table) for to in row):
        return list(items)
    outgoing: list[list[Item]] = [[] for _ in range(mesh.dp_size)]
    for item, to in zip(items, table[mesh.dp_rank], strict=True):
        outgoing[to].append(item)
    kept, outgoing[mesh.dp_rank] = outgoing[mesh.dp_rank], []
    if not mesh.is_first_stage:
        outgoing = [[_without_pixels(item) for item in row] for row in outgoing]
    sent = [to_bytes(row) if row else b"" for row in outgoing]
    received = [tuple(from_bytes(data)) if data else () for data in exchange_bytes(sent, mesh.dp_group)]
    received[mesh.dp_rank] = tuple(kept)
    for rank, row in enumerate(received):
        assert len(row) == table[rank].count(mesh.dp_rank), f"rank {rank} sent {len(row)} groups"
    return [item for row in received for item in row]


def _without_pixels(item: Item) -> Item:
    images = tuple(replace(image, patches=image.patches[:0]) for image in item.prompt.images)
    return replace(item, prompt=replace(item.prompt, images=images))
