"""Ways to repeat a tick: run it, or replay a CUDA graph of it, which costs one launch instead of one a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from megatron_vlmr1.runtime import device


class Recorder(Protocol):
    """Records ticks, functions that read and write nothing but tensors that stay where they are."""

    def record(self, tick: Callable[[], None], reset: Callable[[], None]) -> Callable[[], object]:
        """Return what repeats `tick`; it may run in between, after which `reset` puts its tensors as they were."""
        ...


class Eager:
    """Runs the tick itself."""

    def record(self, tick: Callable[[], None], reset: Callable[[], None]) -> Callable[[], object]:
        """See `Recorder`."""
        return tick


class CudaGraphs:
    """Captures each tick once. CUDA only.

    Graphs hold addresses: whoever keeps one drops it before what it points to moves, and before the process group is
    destroyed, which would wait for graphs with collectives in them. All graphs of a recorder share one pool of memory
    for what lies between a tick's inputs and outputs; they run one after another, so that each may overwrite it. The
    pool is gone with its last graph: a recorder is not used again after that.
    """

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), side_stream()

    def record(self, tick: Callable[[], None], reset: Callable[[], None]) -> Callable[[], object]:
        """See `Recorder`."""
        # First without capturing: cuBLAS and NCCL set themselves up, and kernels are loaded.
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            tick()
        now.wait_stream(self._stream)
        reset()
        graph = torch.cuda.CUDAGraph()
        # Threads that save or prefetch may call CUDA meanwhile: only this one must keep to what can be captured.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            tick()
        return graph.replay


@cache
def side_stream() -> torch.cuda.Stream:
    """Return the stream that is captured: one for the process, as cuBLAS keeps a workspace for each it has seen."""
    return torch.cuda.Stream()


def recorder(cuda_graphs: str) -> Callable[[], Recorder]:
    """Return what makes recorders where `rollout.cuda_graphs` is auto or none."""
    return CudaGraphs if cuda_graphs == "auto" and device.has_cuda() else Eager
