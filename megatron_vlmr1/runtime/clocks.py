"""How far the ranks' wall clocks are apart."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from megatron_vlmr1.runtime import distributed

_ROUNDS = 5


def now() -> float:
    """Return this node's wall clock, in seconds since 1970."""
    return time.time()


def ahead_s() -> list[float]:
    """Return for each rank by how many seconds its wall clock is ahead of rank 0's; all ranks call it.

    Ranks leave a barrier together and read their clocks: the median of some rounds is right to about the time that a
    barrier takes to let all go.
    """
    rounds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        times = distributed.every_row(torch.tensor([now()], dtype=torch.float64))[:, 0].tolist()
        rounds.append([time_ - times[0] for time_ in times])
    return [statistics.median(column) for column in zip(*rounds, strict=True)]
