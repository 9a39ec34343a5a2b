"""Bandwidth and latency in each node, and between every two nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vlmr1.runtime import device, distributed
from megatron_vlmr1.telemetry.progress import mark

WRONG = -1.0  # bytes a second of a link that changes what is sent
_SIZE_BYTES = {"cpu": 1 << 20, "cuda": 32 << 20}
_SMALL = 1  # numbers of a message that measures latency
_LATENCIES, _REPEATS = 5, 5


@dataclass(frozen=True)
class Pair:
    """Two nodes that exchanged messages.

    Attributes:
        nodes: their names.
        bytes_s: in each direction, both at once, over all pairs of ranks; `WRONG` where messages arrived changed.
        latency_s: of one number in both directions; of the slowest pair of ranks.
    """

    nodes: tuple[str, str]
    bytes_s: float
    latency_s: float


def tournament(count: int) -> list[list[tuple[int, int]]]:
    """Return rounds of disjoint pairs in which each of `count` players meets each other once (the circle method)."""
    players = list(range(count + count % 2))  # an odd one rests
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([(min(p), max(p)) for p in pairs if max(p) < count])
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def quick_rounds(count: int) -> int:
    """Return how many rounds of the tournament let each of `count` nodes meet two others, if there are as many."""
    return 2 + count % 2


def in_nodes(nodes: Sequence[Sequence[int]]) -> list[float]:
    """Return for each node the bus bandwidth of an all-reduce within it, bytes a second; 0 where it has one rank.

    `nodes` are the ranks of each; all ranks call it. Bus bandwidth is 2 (n-1)/n of the size over the time.
    """
    rank = dist.get_rank()
    mine = next(ranks for ranks in nodes if rank in ranks)
    rate = 0.0
    if len(mine) > 1:
        whole = len(mine) == dist.get_world_size()
        group = dist.group.WORLD if whole else dist.new_group(list(mine), use_local_synchronization=True)
        tensor = _tensor(rank)
        seconds = min(_timed(lambda: dist.all_reduce(tensor, group=group)) for _ in range(1 + _REPEATS))
        rate = 2 * (len(mine) - 1) / len(mine) * tensor.nbytes / seconds
        if not whole:
            dist.destroy_process_group(group)
    rates = distributed.every_row(torch.tensor([rate], dtype=torch.float64))[:, 0].tolist()
    return [min(rates[r] for r in ranks) for ranks in nodes]


def between_nodes(names: Sequence[str], nodes: Sequence[Sequence[int]], every: bool) -> list[Pair]:
    """Let pairs of nodes exchange messages, disjoint pairs at once; all ranks call it, and all get the pairs.

    In a pair each rank exchanges with the rank of its place on the other node, both ways at once, which is what an
    all-reduce of the two sends between them; what came is compared with what was sent. All of a node's network cards
    are busy at once.

    Args:
        names: of the nodes.
        nodes: ranks of each node.
        every: measure all pairs, or else a few of each node.
    """
    rank = dist.get_rank()
    me = next(index for index, ranks in enumerate(nodes) if rank in ranks)
    place = list(nodes[me]).index(rank)
    played = tournament(len(nodes))[: None if every else quick_rounds(len(nodes))]
    rows: list[float] = []
    for pairs in played:
        other = next((b if a == me else a for a, b in pairs if me in (a, b)), None)
        both = other is not None and place < len(nodes[other])
        rows += exchange(nodes[other][place]) if other is not None and both else (0.0, 0.0)
        mark()
    table = distributed.every_row(torch.tensor(rows, dtype=torch.float64)).tolist() if rows else []
    found = []
    for number, pairs in enumerate(played):
        for a, b in pairs:
            meeting = list(zip(nodes[a], nodes[b], strict=False))
            rates = [min(table[x][2 * number], table[y][2 * number]) for x, y in meeting]
            waits = [max(table[x][2 * number + 1], table[y][2 * number + 1]) for x, y in meeting]
            bytes_s = WRONG if WRONG in rates else sum(rates)
            found.append(Pair((names[a], names[b]), bytes_s, max(waits)))
    return found


def exchange(peer: int) -> tuple[float, float]:
    """Exchange messages with another rank, which calls it too; return (bytes a second each way, seconds of latency).

    The bytes are `WRONG` where what came is not what was sent.
    """
    small, big = torch.zeros(_SMALL, device=device.device()), _tensor(dist.get_rank())
    _meet(small, peer)  # whoever comes first waits here
    latency = statistics.median(_timed(lambda: _meet(small, peer)) for _ in range(_LATENCIES))
    times, right = [], True
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        got = _meet(big, peer)
        _synchronize()
        times.append(time.perf_counter() - begun)
        right &= bool((got == float(peer)).all())
    return big.nbytes / min(times) if right else WRONG, latency


def _meet(tensor: torch.Tensor, peer: int) -> torch.Tensor:
    got = torch.empty_like(tensor)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, got, peer)])
    for work in works:
        work.wait()
    return got


def _tensor(value: float) -> torch.Tensor:
    where = device.device()
    return torch.full((_SIZE_BYTES[where.type] // 4,), float(value), device=where)


def _timed(action: Callable[[], object]) -> float:
    _synchronize()
    begun = time.perf_counter()
    action()
    _synchronize()
    return time.perf_counter() - begun


def _synchronize() -> None:
    if device.has_cuda():
        torch.cuda.synchronize()
