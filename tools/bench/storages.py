"""Bytes of torch's memory that are alive, and the most that have been: every storage once, however many tensors see it.

Seen is what passes through torch's dispatcher on this thread (a CPU's backward pass included), so what a kernel takes
and gives back within itself is not: workspaces of matrix products, buffers of gloo.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OWN = ("megatron_vlmr1", "megatron/core")


class LiveStorages(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        now: bytes alive.
        host: of these, bytes that were marked as memory of the host.
        peak: the most of now - host since `begin`.
        at_peak: the bytes alive at about that moment, by where they were made; only with `explain`.
    """

    def __init__(self, explain: bool = False) -> None:
        super().__init__()
        self.now = self.host = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._explain, self._explained = explain, 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._made: dict[int, str] = {}
        self._ignored: set[int] = set()
        self._hosted: set[int] = set()

    def begin(self) -> None:
        """Begin a phase: the peak is what is alive now."""
        self.peak, self._explained = self.now - self.host, 0

    def ignore(self, pointers: Iterable[int]) -> None:
        """Leave out memory that others made, such as numpy's, by its address."""
        self._ignored.update(pointers)

    def mark_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor's memory as the host's from now on."""
        storage = tensor.untyped_storage()
        self._meet(storage, "host")
        key = storage._cdata
        if key in self._known and key not in self._hosted:
            self._hosted.add(key)
            self.host += self._known[key][1]
        return tensor

    def __enter__(self) -> Any:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = _watched(self._resize, self)  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and look at what it was given and what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._meet(leaf.untyped_storage(), str(func))
        if self.now - self.host > self.peak:
            self.peak = self.now - self.host
            if self._explain and self.peak > 1.002 * self._explained:
                self._explained = self.peak
                self.at_peak = Counter()
                for key, (_, size) in self._known.items():
                    if key not in self._hosted:
                        self.at_peak[self._made[key]] += size
        return out

    def _meet(self, storage: torch.UntypedStorage, how: str) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes() or storage.data_ptr() in self._ignored:
            return
        self._known[key] = weakref.ref(storage, partial(self._gone, key)), storage.nbytes()
        self._made[key] = f"{how} {_place()}" if self._explain else ""
        self.now += storage.nbytes()

    def _gone(self, key: int, _: Any = None) -> None:
        _, size = self._known.pop(key, (None, 0))
        self._made.pop(key, None)
        self.now -= size
        if key in self._hosted:
            self._hosted.remove(key)
            self.host -= size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage anew, whose size was changed."""
        self._gone(storage._cdata)
        self._meet(storage, "resize")


def _watched(resize: Callable[..., Any], live: LiveStorages) -> Callable[..., Any]:
    def call(storage: torch.UntypedStorage, size: int) -> Any:
        out = resize(storage, size)
        live.resized(storage)
        return out

    return call


def _place() -> str:
    """Return the innermost line of ours or megatron-core's that is being run, and the one it was called from."""
    frame: Any = sys._getframe(2)
    found = []
    while frame is not None and len(found) < 2:
        name = frame.f_code.co_filename
        if any(own in name for own in OWN):
            found.append(f"{name.rsplit('/', 1)[1]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)
