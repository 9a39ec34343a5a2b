"""Numbers and bytes between the ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_vlmr1.runtime import device


def gather_numbers(values: Sequence[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Return every rank's whole numbers (64 bits), in the order of ranks; each rank may have another count."""
    where, ranks = device.device(), dist.get_world_size(group)
    count = torch.tensor([len(values)], dtype=torch.int64, device=where)
    counts = [torch.empty_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count, group=group)
    longest = max(int(c) for c in counts)
    mine = torch.zeros(max(1, longest), dtype=torch.int64, device=where)
    mine[: len(values)] = torch.tensor(list(values), dtype=torch.int64, device=where)
    rows = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(rows, mine, group=group)
    return [row[: int(n)].tolist() for row, n in zip(rows, counts, strict=True)]


def exchange_bytes(outgoing: Sequence[bytes], group: dist.ProcessGroup) -> list[bytes]:
    """Send ``outgoing[r]`` to rank r of the group; return what each rank sent here. All ranks of the group call it."""
    where = device.device()
    assert len(outgoing) == dist.get_world_size(group)
    sends = torch.tensor([len(data) for data in outgoing], dtype=torch.int64, device=where)
    receives = torch.empty_like(sends)
    dist.all_to_all_single(receives, sends, group=group)
    sizes = receives.tolist()
    assert all(size >= 0 for size in sizes)
    joined = b"".join(outgoing)
    source = torch.empty(len(joined), dtype=torch.uint8, device=where)
    if joined:
        source.copy_(torch.frombuffer(bytearray(joined), dtype=torch.uint8))
    target = torch.empty(sum(sizes), dtype=torch.uint8, device=where)
    dist.all_to_all_single(target, source, sizes, sends.tolist(), group=group)
    return [part.cpu().numpy().tobytes() for part in target.split(sizes)]
