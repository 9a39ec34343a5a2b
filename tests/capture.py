"""CUDA graphs on a CPU: what could not be captured fails, and what was captured is replayed on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "_unique2"}
INDEXING = {"index", "index_put_", "_index_put_impl_"}


class Capturable(TorchDispatchMode):
    """Fails on operators that would make the host wait for the device, copy to it, or have shapes by values."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check one operator, and call it."""
        name, _, overload = function.__name__.partition(".")
        assert name not in WAITING, f"the host waits for {name}"
        assert name != "lift_fresh", "a tensor made of numbers of the host"
        assert name != "where" or "Scalar" not in overload, "a number on its way to the device"
        if name in INDEXING:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index"
        return function(*args, **(kwargs or {}))


class Checked:
    """A recorder that runs ticks, and fails on those that could not be captured."""

    def record(self, tick: Callable[[], None], reset: Callable[[], None]) -> Callable[[], object]:
        """See `rollout.graphs.Recorder`."""

        def run() -> None:
            with Capturable():
                tick()

        return run


class Tape(Capturable):
    """A recorder of operators and of the memory that they were called with.

    A replay calls them on the same tensors, whatever those hold by now, and puts the results where they were then.
    """

    made: list[Tape] = []

    def __init__(self) -> None:
        super().__init__()
        self.captures = self.replays = 0
        Tape.made.append(self)

    def record(self, tick: Any, reset: Callable[[], None]) -> Callable[[], object]:
        """See `rollout.graphs.Recorder`."""
        tick()  # as CUDA warms up: whoever counts ticks on the device must bear it
        reset()
        operators: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._operators = operators
        held = [tick._numbers, tick._table, tick._cache.own, *([] if tick._seen is None else [tick._seen])]
        values = [x.clone() for x in held]
        with self:
            tick()
        for x, value in zip(held, values, strict=True):
            x.copy_(value)  # capturing computes nothing
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for function, args, kwargs, results in operators:
                found = function(*args, **kwargs)
                for new, old in zip(_tensors(found), results, strict=True):
                    if new.data_ptr() != old.data_ptr():
                        old.copy_(new)

        return replay

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one operator."""
        found = super().__torch_dispatch__(function, types, args, kwargs)
        self._operators.append((function, args, kwargs or {}, _tensors(found)))
        return found


def _tensors(x: object) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in x for t in _tensors(part)] if isinstance(x, list | tuple) else []
