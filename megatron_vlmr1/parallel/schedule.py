"""Micro-batches through megatron-core's pipeline schedule, and point-to-point for generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.telemetry.progress import mark

Batch = TypeVar("Batch")
Result = dict[str, torch.Tensor]


class Sending(NamedTuple):
    """A message on its way; the tensor has to stay as it is until `wait` returns."""

    work: dist.Work | None
    tensor: torch.Tensor

    def wait(self) -> None:
        """Return once the message is out."""
        if self.work is not None:
            self.work.wait()


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
        mark()

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
    dist.recv(tensor, dist.get_global_rank(mesh.pp_group, (mesh.pp_rank - 1) % mesh.pp_size), group=mesh.pp_group)
    return tensor


def send_to_next(tensor: torch.Tensor, mesh: Mesh) -> Sending:
    """Begin to send one tensor to the next pipeline stage; after the last one comes the first one's next chunk."""
    to = dist.get_global_rank(mesh.pp_group, (mesh.pp_rank + 1) % mesh.pp_size)
    return Sending(dist.isend(tensor, to, group=mesh.pp_group), tensor)


def send_to_others(tensor: torch.Tensor, mesh: Mesh) -> list[Sending]:
    """Begin to send the last stage's `tensor`, in host memory, to all other stages."""
    stages = [dist.get_global_rank(mesh.pp_group, stage) for stage in range(mesh.pp_size - 1)]
    return [Sending(dist.isend(tensor, to, group=mesh.pp_group), tensor) for to in stages]


def receive_from_last(shape: tuple[int, ...], dtype: torch.dtype, mesh: Mesh) -> torch.Tensor:
    """Receive into host memory what the last stage sends to all others."""
    tensor = torch.empty(shape, dtype=dtype)
    dist.recv(tensor, dist.get_global_rank(mesh.pp_group, mesh.pp_size - 1), group=mesh.pp_group)
    return tensor
