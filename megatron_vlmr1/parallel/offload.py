"""Gradients and optimizer state out of the device's memory while nothing needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.overlap import DataParallel
from megatron_vlmr1.runtime import device

When = Literal["none", "rollout", "always"]


class _Gone(NamedTuple):
    """Memory that was given back, and what was in it."""

    storage: torch.UntypedStorage
    size: int
    kept: torch.Tensor | None  # its bytes in host memory; None where they are not needed again


class Offload:
    """Empties the storages of gradients and of the optimizer's masters and moments, and fills them again.

    The tensors stay, with every view of them: the buckets of the gradient buffers, each parameter's `main_grad`, what
    the optimizer holds. Nothing may look into them meanwhile. What comes back has the same bits; gradients come back
    as zeros. In fp32 the masters are the parameters themselves, which stay.

    Args:
        ddp: whose gradients.
        optimizer: whose state.
        when: see `optimizer.offload` of the settings.
    """

    def __init__(self, ddp: Sequence[DataParallel], optimizer: MegatronOptimizer, when: When) -> None:
        self._ddp, self._optimizer, self.when = ddp, optimizer, when
        self._gradients: list[_Gone] = []
        self._state: list[_Gone] = []
        self._host: dict[str, torch.Tensor] = {}  # kept for the next time: pinned memory is dear to get

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held."""
        return sum(tensor.nbytes for tensor in self._host.values())

    def before_generation(self) -> None:
        """Give back the memory of gradients and of the optimizer's state, unless that has been done."""
        if self.when == "none":
            return
        self.after_step(always=True)
        if not self._gradients:
            buffers = [buffer.grad_data.untyped_storage() for chunk in self._ddp for buffer in chunk.buffers]
            self._gradients = [_Gone(storage, storage.nbytes(), None) for storage in buffers]
            for storage in buffers:
                storage.resize_(0)

    def before_backward(self) -> None:
        """Take memory for gradients; they are zeros."""
        for gone in self._gradients:
            gone.storage.resize_(gone.size)
            _content(gone.storage).zero_()
        self._gradients = []

    def before_step(self) -> None:
        """Bring the optimizer's state back: before a step, a save, and whatever else looks at it."""
        for gone in self._state:
            assert gone.kept is not None
            gone.storage.resize_(gone.size)
            _content(gone.storage).copy_(gone.kept, non_blocking=True)
        self._state = []

    def after_step(self, always: bool = False) -> None:
        """Move the optimizer's state to host memory, if that is where it lies between steps (or `always`)."""
        if self._state or not (always or self.when == "always"):
            return
        for key, storage in self._storages():
            size = storage.nbytes()
            kept = self._host.get(key)
            if kept is None or len(kept) != size:
                kept = self._host[key] = device.host_empty(size, torch.uint8)
            kept.copy_(_content(storage), non_blocking=True)  # the next user of the memory is behind it in the stream
            self._state.append(_Gone(storage, size, kept))
            storage.resize_(0)

    def _storages(self) -> Iterator[tuple[str, torch.UntypedStorage]]:
        """Yield each storage of the optimizer's state once, with a name that stays; not those of the parameters."""
        seen = {buffer.param_data.untyped_storage()._cdata for chunk in self._ddp for buffer in chunk.buffers}
        for i, (_, state) in enumerate(parallel_optimizer.states(self._optimizer)):
            for name, tensor in state.items():
                storage = tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    yield f"{i} {name}", storage


def _content(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a storage's bytes, uint8 [n]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
