"""One model's weights into another layout of the same ranks, in memory.

Both layouts say which rows or columns of which Hugging Face tensor each of their parameters is made of, so what has to
travel follows from the two tables, whatever the layouts: tied output layers on several stages, padded vocabularies,
gate and up fused, fewer key/value heads than ranks.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_vlmr1.checkpoint.weights import parameter_pieces
from megatron_vlmr1.models.vlm import VlmModel
from megatron_vlmr1.runtime import device, distributed

BATCH_BYTES = 256 << 20  # on their way at a time, over all ranks


class Part(NamedTuple):
    """Rows (dim 0) or columns (dim 1) `start`..`stop` of a tensor, at `offset` of a parameter of some rank."""

    name: str | None  # None: padding, zeros
    dim: int
    start: int
    stop: int
    parameter: int
    offset: int


class Transfer(NamedTuple):
    """`size` rows or columns from one rank's parameter to another's."""

    source: int  # index in the group
    target: int
    dim: int
    source_parameter: int
    source_offset: int
    target_parameter: int
    target_offset: int
    size: int


class Reshard:
    """Copies the parameters of `source` chunks into those of `target` chunks, over the ranks of `group`."""

    def __init__(self, source: Sequence[VlmModel], target: Sequence[VlmModel], group: dist.ProcessGroup) -> None:
        """Agree with the other ranks of the group on what has to travel."""
        self._group, self._rank = group, dist.get_rank(group)
        self._source, self._target = _parameters(source), _parameters(target)
        tables = _exchanged([_parts(source), _parts(target)], group)
        self._plan = list(transfers([table[0] for table in tables], [table[1] for table in tables]))
        self._padding = [part for part in _parts(target) if part.name is None]
        widest = torch.tensor(max(p.element_size() * p[:1].numel() for p in self._target), device=device.device())
        dist.all_reduce(widest, dist.ReduceOp.MAX, group=group)  # not all ranks hold the tower
        self._row_bytes = int(widest)

    @torch.no_grad()
    def __call__(self) -> None:
        """Copy; all ranks of the group call it."""
        for part in self._padding:
            self._window(self._target, part.parameter, part.dim, part.offset, part.stop - part.start).zero_()
        for batch in self._batches():
            self._move(batch)

    def _batches(self) -> Iterator[list[Transfer]]:
        """Cut the plan where every rank cuts it."""
        batch: list[Transfer] = []
        size = 0
        for transfer in self._plan:
            batch.append(transfer)
            size += transfer.size * self._row_bytes
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def _move(self, batch: list[Transfer]) -> None:
        operations, arrived = [], []
        for t in batch:
            if self._rank == t.source:
                out = self._window(self._source, t.source_parameter, t.dim, t.source_offset, t.size)
                if self._rank == t.target:
                    self._window(self._target, t.target_parameter, t.dim, t.target_offset, t.size).copy_(out)
                else:
                    to = dist.get_global_rank(self._group, t.target)
                    operations.append(dist.P2POp(dist.isend, out.contiguous(), to, group=self._group))
            elif self._rank == t.target:
                place = self._window(self._target, t.target_parameter, t.dim, t.target_offset, t.size)
                buffer = torch.empty(place.shape, dtype=place.dtype, device=place.device)
                source = dist.get_global_rank(self._group, t.source)
                operations.append(dist.P2POp(dist.irecv, buffer, source, group=self._group))
                arrived.append((place, buffer))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for place, buffer in arrived:
            place.copy_(buffer)

    @staticmethod
    def _window(parameters: list[torch.nn.Parameter], which: int, dim: int, offset: int, size: int) -> torch.Tensor:
        return parameters[which].data.narrow(dim, offset, size)


def transfers(sources: Sequence[Sequence[Part]], targets: Sequence[Sequence[Part]]) -> Iterator[Transfer]:
    """Yield what has to travel so that every target part is covered; the same on every rank.

    What a rank has itself it copies; what several others have is asked of them by turns.

    Args:
        sources: parts of each rank in the layout that there is.
        targets: parts of each rank in the layout to be made.
    """
    owners: dict[str, list[tuple[int, Part]]] = defaultdict(list)
    for rank, parts in enumerate(sources):
        for part in parts:
            if part.name is not None:
                owners[part.name].append((rank, part))
    for target, parts in enumerate(targets):
        for part in parts:
            at = part.start
            while part.name is not None and at < part.stop:
                having = [(rank, own) for rank, own in owners[part.name] if own.start <= at < own.stop]
                assert having, f"nobody has {part.name} from {at}"
                mine = [pair for pair in having if pair[0] == target]
                source, own = mine[0] if mine else having[target % len(having)]
                stop = min(part.stop, own.stop)
                yield Transfer(
                    source,
                    target,
                    part.dim,
                    own.parameter,
                    own.offset + at - own.start,
                    part.parameter,
                    part.offset + at - part.start,
                    stop - at,
                )
                at = stop


def _parameters(chunks: Sequence[VlmModel]) -> list[torch.nn.Parameter]:
    """Return the parameters themselves: training moves their values into buffers of its own."""
    return [part.parameter for chunk in chunks for part in parameter_pieces(chunk)]


def _parts(chunks: Sequence[VlmModel]) -> list[Part]:
    """Return what this rank's parameters are made of."""
    out, number = [], 0
    for chunk in chunks:
        for _, _, pieces in parameter_pieces(chunk):
            offset = 0
            for piece in pieces[chunk.mesh.tp_rank]:
                out.append(Part(piece.name, piece.dim, piece.start, piece.stop, number, offset))
                offset += piece.stop - piece.start
            number += 1
    return out


def _exchanged(tables: list[list[Part]], group: dist.ProcessGroup) -> list[list[list[Part]]]:
    """Return every rank's tables."""
    mine = json.dumps(tables)
    texts = [distributed.broadcast_text(mine, rank, group) for rank in dist.get_process_group_ranks(group)]
    return [[[Part(*row) for row in table] for table in json.loads(text)] for text in texts]
