"""Start and end of the process group, and text between ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vlmr1.runtime import device
from megatron_vlmr1.runtime.ranks import Identity, identity, node_name
from megatron_vlmr1.telemetry.progress import mark

T = TypeVar("T")


def start(timeout_s: int) -> Identity:
    """Join the process group that the environment describes; without one, a group of this process alone.

    Raises:
        ValueError: more ranks than GPUs on this node, several ranks without MASTER_ADDR and MASTER_PORT, or CUDA on
            some nodes only; the last on all ranks.
    """
    me = identity() or Identity(0, 1, 0)
    if device.has_cuda():
        if me.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {me.rank} is number {me.local_rank} on its node, which has {torch.cuda.device_count()} GPUs: "
                'start fewer ranks, or keep to the CPU with CUDA_VISIBLE_DEVICES=""'
            )
        torch.cuda.set_device(me.local_rank)
    if "VLMR1_INIT_METHOD" in os.environ:
        init_method: str | None = os.environ["VLMR1_INIT_METHOD"]
    elif me.world == 1:
        init_method = None
    elif "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        init_method = "env://"
    else:
        raise ValueError("MASTER_ADDR and MASTER_PORT must be set for a job of several ranks")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.has_cuda() else "gloo",
        init_method=init_method,
        store=dist.HashStore() if init_method is None else None,
        rank=me.rank,
        world_size=me.world,
        timeout=timedelta(seconds=timeout_s),
    )
    _check_same_devices()
    return me


def _check_same_devices() -> None:
    """Refuse a job of which some nodes have lost CUDA: with NCCL here and gloo there they would hang."""
    cuda = device.has_cuda()
    either = torch.tensor([cuda, not cuda], dtype=torch.int32)  # on the CPU, where all ranks have gloo
    dist.all_reduce(either, dist.ReduceOp.MAX)
    if not either.all():
        return
    lacking: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lacking, "" if cuda else node_name())
    names = ", ".join(dict.fromkeys(filter(None, lacking)))
    raise ValueError(f"no CUDA on {names}, while other nodes have it: mend the driver there, or leave the node out")


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is rank 0 of the world."""
    return dist.get_rank() == 0


def broadcast_text(text: str, source: int = 0, group: dist.ProcessGroup | None = None) -> str:
    """Give every rank of the group the text of global rank `source`."""
    data = text.encode() if dist.get_rank() == source else b""
    size = torch.tensor([len(data)], device=device.device())
    dist.broadcast(size, source, group=group)
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device.device())
    if data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if len(buffer):
        dist.broadcast(buffer, source, group=group)
    mark()
    return bytes(buffer.cpu().numpy()).decode()


def every_row(mine: torch.Tensor) -> torch.Tensor:
    """Return the numbers [n] of every rank of the world as a table [world, n]; the same n and type on all ranks."""
    mine = mine.to(device.device())
    table = mine.new_empty(dist.get_world_size(), len(mine))
    dist.all_gather(list(table.unbind()), mine)
    return table


def from_node_leader(text: str, local_rank: int) -> str:
    """Give every rank the text of its own node's first rank; ranks of a node are numbered one after another."""
    rank = dist.get_rank()
    leaders = [r for r, (number,) in enumerate(every_row(torch.tensor([local_rank])).tolist()) if number == 0]
    texts = {leader: broadcast_text(text, leader) for leader in leaders}
    return texts[max(leader for leader in leaders if leader <= rank)]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank of the world; all ranks get the same answer."""
    value = torch.tensor([float(flag)], device=device.device())
    dist.all_reduce(value, dist.ReduceOp.MAX)
    mark()
    return bool(value)


def gathered(mine: T) -> list[T]:
    """Return every rank's object on the first rank, an empty list on the others; all ranks call it.

    Between ranks of one job only: objects travel as pickles.
    """
    out: list[Any] = [None] * dist.get_world_size() if is_first() else []
    dist.gather_object(mine, out or None)
    mark()
    return out


def place() -> tuple[int, int]:
    """Return this rank and the size of the world; (0, 1) outside a job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(action: Callable[[], object], only_first: bool = False) -> None:
    """Let every rank, or the first only, do something that may fail, and wait for all; outside a job just do it.

    Raises:
        ValueError: it raised one on some rank; the same line on all ranks.
        OSError: the same.
    """
    if not dist.is_initialized():
        action()
        return
    wrong = failed = ""
    if is_first() or not only_first:
        try:
            action()
        except ValueError as error:
            wrong = str(error) or repr(error)
        except OSError as error:
            failed = str(error) or repr(error)
    agree(wrong, ValueError)
    agree(failed)


def agree(problem: str, kind: type[Exception] = OSError) -> None:
    """Go on if no rank has a problem; all ranks call it after work of their own that may fail.

    Args:
        problem: what went wrong on this rank, or nothing.
        kind: of what is raised.

    Raises:
        kind: the problem of the first rank that has one, in one line; the same on all ranks.
    """
    if problem := first_told(problem):
        raise kind(" ".join(problem.split()))


def first_told(text: str) -> str:
    """Return the text of the first rank that has one, nothing if none has; all ranks call it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    first = torch.tensor([rank if text else world], device=device.device())
    dist.all_reduce(first, dist.ReduceOp.MIN)
    mark()
    return broadcast_text(text, int(first)) if int(first) < world else ""
