"""Which rank holds what, as tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table

from megatron_vlmr1.checkpoint.coverage import Coverage
from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models import families
from megatron_vlmr1.models.pieces import Piece
from megatron_vlmr1.models.shape import VlmShape

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")  # of a layer or block, within a name


def mapping_table(shape: VlmShape, coverage: Coverage) -> Table:
    """Return a row for each Hugging Face tensor and rank; layers that are held alike share one."""
    sizes = families.of(shape).tensor_shapes(shape)
    ranks: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    by_rank: dict[int, dict[tuple[str, str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for held in coverage.holdings:
        if held.piece.name is not None:
            name, number = _pattern(held.piece.name)
            key = name, slice_text(held.piece, sizes[held.piece.name]), _pattern(held.parameter)[0]
            by_rank[held.rank][key].append(number)
    for rank, found in by_rank.items():
        for (name, part, parameter), numbers in found.items():
            ranks[name, part, parameter, _spans(numbers)].append(rank)
    table = Table(title="Hugging Face tensors and ranks")
    for heading in ("Hugging Face", "slice", "rank", "Megatron"):
        table.add_column(heading, overflow="fold")
    for (name, part, parameter, span), holders in ranks.items():
        table.add_row(name.replace("*", span), part, _spans(holders), parameter.replace("*", span))
    return table


def mapping_rows(coverage: Coverage) -> Iterator[dict[str, Any]]:
    """Yield a row for each part of a tensor on a rank; zeros that pad a parameter have no tensor."""
    for held in coverage.holdings:
        yield {
            "tensor": held.piece.name,
            "dim": held.piece.dim,
            "start": held.piece.start,
            "stop": held.piece.stop,
            "rank": held.rank,
            "parameter": held.parameter,
            "replica": held.replica,
        }


def rank_table(layout: ParallelConfig, coverage: Coverage, bytes_each: int) -> Table:
    """Return a row for each rank: what of the language model it holds, and how much that is."""
    table = Table(title="ranks of one copy of the model")
    for heading in ("rank", "tensor", "pipeline", "layers", "parameters", "GB"):
        table.add_column(heading, justify="right")
    for rank, count in enumerate(coverage.rank_parameters):
        stage, tp_rank = divmod(rank, layout.tensor_model_parallel_size)
        mine = _spans({h.layer for h in coverage.holdings if h.rank == rank and h.layer is not None})
        cells = (rank, tp_rank, stage, mine, f"{count:,}", f"{count * bytes_each / 1e9:.2f}")
        table.add_row(*map(str, cells))
    return table


def slice_text(piece: Piece, size: Sequence[int]) -> str:
    """Return "all", or which rows or columns of a tensor of this size a piece is."""
    if piece.stop - piece.start == size[piece.dim]:
        return "all"
    return f"{('rows', 'columns')[piece.dim]} {piece.start}:{piece.stop} of {size[piece.dim]}"


def _pattern(name: str) -> tuple[str, int]:
    """Return a name with * for its first number, and that number (-1: none)."""
    found = _NUMBER.search(name)
    return (name, -1) if found is None else (name[: found.start()] + "*" + name[found.end() :], int(found[1]))


def _spans(numbers: Iterable[int]) -> str:
    """Return numbers as "0-3,7"."""
    spans: list[list[int]] = []
    for n in sorted(set(numbers)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
