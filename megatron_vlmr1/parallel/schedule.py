"""Micro-batches through megatron-core's pipeline schedule, and point-to-point for generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vlmr1.parallel.mesh import Mesh

Batch = TypeVar("Batch")
Result = dict[str, torch.Tensor]


def run(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    forward: Callable[[torch.nn.Module, Batch], torch.Tensor],
    loss: Callable[[torch.Tensor, Batch], tuple[torch.Tensor, Result]],
    mesh: Mesh,
    forward_only: bool = False,
) -> list[Result]:
    """Run micro-batches through all stages, forward and (unless `forward_only`) backward.

    Args:
        chunks: this stage's data-parallel wrappers, or its bare chunks for a forward pass.
        batches: micro-batches, the same on all ranks that hold one copy of the model; with several chunks a multiple
            of the pipeline size.
        forward: one chunk's part of the model.
        loss: last stage only; hidden states to a loss that is already divided by its global count, and results.
        mesh: the ranks.
        forward_only: no gradients.

    Returns:
        The results of each micro-batch on the last stage; an empty list on the others.
    """

    def step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)

        def finish(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Result]:
            value, results = loss(hidden, batch)
            return value, torch.ones((), dtype=torch.int, device=value.device), results

        return forward(chunk, batch), finish

    function = get_forward_backward_func()
    return function(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=1,  # stages exchange the true shapes
        micro_batch_size=1,
        forward_only=forward_only,
    )


def receive_from_previous(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device, mesh: Mesh) -> torch.Tensor:
    """Receive one tensor from the previous pipeline stage; the first stage's next chunks follow the last stage."""
    tensor = torch.empty(shape, dtype=dtype, device=where)
    previous = (mesh.pp_rank - 1) % mesh.pp_size
    dist.recv(tensor, dist.get_global_rank(mesh.pp_group, previous), group=mesh.pp_group)
    return tensor


def send_to_next(tensor: torch.Tensor, mesh: Mesh) -> None:
    """Send one tensor to the next pipeline stage; the last stage's go to the first stage's next chunk."""
    following = (mesh.pp_rank + 1) % mesh.pp_size
    dist.send(tensor.contiguous(), dist.get_global_rank(mesh.pp_group, following), group=mesh.pp_group)


def broadcast_from_last(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Give all stages the last stage's values of `tensor`, in place."""
    if mesh.pp_size > 1:
        dist.broadcast(tensor, dist.get_global_rank(mesh.pp_group, mesh.pp_size - 1), group=mesh.pp_group)
    return tensor
