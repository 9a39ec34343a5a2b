"""Numbers from the ranks that speak to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import device


def sums(values: Mapping[str, float], speaks: bool) -> dict[str, float]:
    """Add `values` over the ranks of the world that speak; all ranks pass the same keys and get the same sums."""
    return _reduced(values, speaks, dist.ReduceOp.SUM, 0.0)


def maxima(values: Mapping[str, float], speaks: bool) -> dict[str, float]:
    """Return the largest of each value over the ranks of the world that speak."""
    return _reduced(values, speaks, dist.ReduceOp.MAX, float("-inf"))


def lost_anywhere(lost: Sequence[bool], mesh: Mesh) -> list[bool]:
    """Return which items are lost on any rank of this copy of the model, so that none of them goes on without it."""
    if mesh.tp_size * mesh.pp_size == 1 or not lost:
        return list(lost)
    flags = torch.tensor([float(flag) for flag in lost], device=device.device())
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.model_group)
    return [bool(flag) for flag in flags.tolist()]


def _reduced(
    values: Mapping[str, float], speaks: bool, op: dist.ReduceOp.RedOpType, nothing: float
) -> dict[str, float]:
    numbers = [float(v) if speaks else nothing for v in values.values()]
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device.device())
    dist.all_reduce(tensor, op)
    return dict(zip(values, tensor.tolist(), strict=True))
