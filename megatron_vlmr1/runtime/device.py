"""Where tensors live; and megatron-core on a machine without CUDA.

megatron-core names "cuda" in many places. On a machine without CUDA `prepare_megatron` redirects those places to the
CPU, once per process and before megatron-core is first used, better before it is imported; with CUDA it changes
nothing. Each redirection below says which use in megatron-core 0.16 needs it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of `config.precision.dtype`

_CPU = torch.device("cpu")
_OWN_PAGES = 1 << 20  # bytes of host memory that are not left to torch's allocator
_prepared = False
_nowhere = False  # whether tensors are made without memory


def has_cuda() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this process: its current GPU, or the CPU; "meta" within `without_memory`."""
    if _nowhere:
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Let models be built that have shapes and no memory."""
    global _nowhere
    former, _nowhere = _nowhere, True
    try:
        with torch.device("meta"):
            yield
    finally:
        _nowhere = former


def host_empty(shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in host memory, with any content; pinned where there are GPUs, for copies at the bus's speed.

    torch pins powers of two of bytes: up to twice what was asked for. So what is large gets pages of its own here; they
    are given back with the tensor, and no copy from or to it may be under way then.
    """
    size = math.prod([shape] if isinstance(shape, int) else shape) * dtype.itemsize
    if not has_cuda() or size < _OWN_PAGES:
        return torch.empty(shape, dtype=dtype, device=_CPU, pin_memory=has_cuda())
    return torch.frombuffer(_pinned(size), dtype=dtype).view(shape)


def _pinned(size: int) -> memoryview:
    """Return memory that is locked for CUDA until nobody has it any more; CUDA only."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)  # or this process's next write went to a copy, and the GPU's to the original
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    cuda = torch.cuda.cudart()
    if problem := int(cuda.cudaHostRegister(address, size, 0)):
        raise RuntimeError(f"CUDA could not lock {size / 1e9:.1f} GB of host memory: cudaHostRegister says {problem}")
    view = memoryview(pages)

    def unlock(pages: mmap.mmap) -> None:
        cuda.cudaHostUnregister(address)

    # Its argument keeps the pages: by themselves they would be gone before a finalizer of theirs is called.
    weakref.finalize(view, unlock, pages).atexit = False
    return view


def fetch(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a tensor of the device into host memory, and wait for what was asked of the device up to here, no longer."""
    target.copy_(source, non_blocking=True)
    if has_cuda():
        done = torch.cuda.Event()
        done.record()
        done.synchronize()


def name() -> str | None:
    """Return the name of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_name() if has_cuda() else None


def peak_bytes() -> int:
    """Return the most memory that this process's GPU has held in tensors since this was called last."""
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def capability() -> tuple[int, int]:
    """Return the compute capability of this process's GPU; CUDA only."""
    return torch.cuda.get_device_capability()


def cuda_version() -> tuple[int, int]:
    """Return the version of CUDA that torch is built for; CUDA only."""
    major, minor = str(torch.version.cuda).split(".")[:2]
    return int(major), int(minor)


def uuid() -> str | None:
    """Return the name by which NVML knows this process's GPU; None on a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}" if has_cuda() else None


def prepare_megatron() -> None:
    """Make megatron-core usable on this machine. Idempotent; does nothing where there is CUDA."""
    global _prepared
    if _prepared or has_cuda():
        return
    _prepared = True
    _redirect_compiler()
    _redirect_device_names()
    _redirect_streams()
    _redirect_type_names()
    _redirect_rng()
    _redirect_collectives()


def _names_cuda(where: Any) -> bool:
    return (isinstance(where, str) and where.startswith("cuda")) or (
        isinstance(where, torch.device) and where.type == "cuda"
    )


def _redirect_compiler() -> None:
    """`torch.compile` of small functions that are not called here: a third of the time that importing them takes."""

    def keep(model: Any = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    torch.compile = keep  # type: ignore[assignment]


def _redirect_device_names() -> None:
    """`torch.cuda.current_device()` as a device, `device="cuda"` in factories, `.cuda()` and `.to("cuda")`."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.empty_cache = lambda: None
    torch.cuda.reset_peak_memory_stats = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    # `with torch.device("meta")` knows the factories by identity: let it remember the originals.
    torch.utils._device._device_constructors()  # type: ignore[no-untyped-call]
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if any(_names_cuda(a) for a in args if isinstance(a, str | torch.device)):
            args = tuple(_CPU if _names_cuda(a) else a for a in args)
        return function(*args, **kwargs)

    return call


class _NoStream:
    """A stream on a device that has none: everything is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self, *_: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, *_: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, *_: Any) -> None:
        """Nothing to record."""

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _redirect_streams() -> None:
    """Streams of the gradient buffers, the pipeline schedule and the checkpoint writer."""
    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = _NoStream  # type: ignore[assignment]
    torch.cuda.default_stream = _NoStream  # type: ignore[assignment]
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False


def _redirect_type_names() -> None:
    """`Tensor.type()` strings, which the optimizers compare with "torch.cuda.FloatTensor" and its like."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core."):
                return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    for name, dtype in (("FloatTensor", torch.float32), ("LongTensor", torch.int64), ("IntTensor", torch.int32)):
        setattr(torch.cuda, name, functools.partial(torch.tensor, dtype=dtype))


def _redirect_rng() -> None:
    """The CUDA generator that megatron-core's RNG tracker forks; the CPU generator takes its part."""
    from torch.cuda import random as cuda_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    for module in (torch.cuda, cuda_random):
        module.get_rng_state = get_state  # type: ignore[attr-defined]
        module.set_rng_state = set_state  # type: ignore[attr-defined]
        module.manual_seed = torch.manual_seed  # type: ignore[attr-defined]
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _redirect_collectives() -> None:
    """`barrier(device_ids=...)`, which gloo refuses."""
    original = dist.barrier

    def barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return original(*args, **kwargs)

    dist.barrier = barrier
