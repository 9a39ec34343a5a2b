"""Host memory of our own, in which a save waits until it is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_vlmr1.runtime import device


class Staging:
    """Buffers that hold one save, kept for the next.

    On the first copy of the model (data-parallel rank 0) each pipeline stage's first tensor-parallel rank holds the
    stage's whole weights in their own type; every rank holds its own optimizer shard, 12 bytes for each of its
    parameters (fp32 master and two moments) in `dp_reshardable`. In `fully_reshardable` data-parallel rank 0 holds 12
    bytes for each parameter of its tensor- and pipeline-parallel part, twice for the moment in which they are gathered.
    Pinned where there are GPUs, so that copies run at the bus's speed.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}
        self._used: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def begin(self) -> None:
        """Begin to stage a save; nothing of the one before is needed any more."""
        self._used = set()

    def empty(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the buffer of that name for the save that is being staged; contiguous, with any content."""
        assert key not in self._used, key
        self._used.add(key)
        held = self._held.get(key)
        if held is None or held.shape != torch.Size(shape) or held.dtype != dtype:
            held = device.host_empty(tuple(shape), dtype)
            self._held[key] = held
        return held

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor, wherever that lies; whole once `settle` is called."""
        return self.empty(key, tensor.shape, tensor.dtype).copy_(tensor.detach(), non_blocking=True)

    def settle(self) -> None:
        """End the staging of a save: wait for copies, forget buffers that it did not use."""
        if device.has_cuda():
            torch.cuda.synchronize()
        self._held = {key: self._held[key] for key in self._used}

    def clear(self) -> None:
        """Give the memory back."""
        self._held, self._used = {}, set()
