"""Rows of a packed tensor: one after another where they can be, or by their numbers."""

from __future__ import annotations

import numpy as np
import torch

from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import IntArray

Rows = slice | torch.Tensor  # of a packed row: one after another, which needs no copy, or their numbers


def rows(numbers: IntArray) -> Rows:
    """Return rows of these numbers, as a slice where they count up by one."""
    start = int(numbers[0]) if numbers.size else 0
    if np.array_equal(numbers, np.arange(start, start + numbers.size)):
        return slice(start, start + numbers.size)
    return torch.from_numpy(numbers).to(device.device())


def take(x: torch.Tensor, which: Rows, dim: int = 0) -> torch.Tensor:
    """Return rows of x: a view, or a copy where they are numbered."""
    if isinstance(which, slice):
        return x.narrow(dim, which.start, which.stop - which.start)
    return x.index_select(dim, which)


def put(x: torch.Tensor, which: Rows, values: torch.Tensor, dim: int = 0) -> None:
    """Overwrite rows of x, each named once, with values of any floating type."""
    if isinstance(which, slice):
        take(x, which, dim).copy_(values)
    else:
        x.index_copy_(dim, which, values.to(x.dtype))


def add(x: torch.Tensor, which: Rows, values: torch.Tensor) -> None:
    """Add values to rows of x, each named once, in place."""
    if isinstance(which, slice):
        take(x, which).add_(values)
    else:
        x.index_add_(0, which, values)
