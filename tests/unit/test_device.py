"""megatron-core's "cuda" without CUDA: every redirection, one by one."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_vlmr1.runtime import device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is redirected where there is CUDA")
NAMES = ("cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0))
REDIRECTED = (
    (torch.cuda, "current_device"),
    *((torch.cuda, name) for name in ("Stream", "current_stream", "synchronize", "get_rng_state", "manual_seed")),
    *((torch, name) for name in ("tensor", "zeros", "ones", "empty", "full", "arange")),
    *((torch.Tensor, name) for name in ("cuda", "to", "type")),
    (torch.nn.Module, "cuda"),
    (torch, "compile"),
    (dist, "barrier"),
)


@pytest.fixture(autouse=True, scope="module")
def prepared() -> None:
    device.prepare_megatron()


def test_the_device_is_the_cpu():
    assert torch.cuda.current_device() == torch.device("cpu") == device.device()
    assert not device.has_cuda()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(0)


def test_nothing_is_compiled():
    def double(x):
        return 2 * x

    assert torch.compile(double) is double and torch.compile(dynamic=True)(double) is double


def test_megatron_is_imported_without_the_compiler():
    code = (
        "import sys; from megatron_vlmr1.runtime import device; device.prepare_megatron();"
        "import megatron_vlmr1.train.grpo; print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_factories(name):
    made = {
        "tensor": torch.tensor([1, 2], device=name),
        "zeros": torch.zeros(2, 3, device=name),
        "ones": torch.ones((2,), dtype=torch.int32, device=name),
        "empty": torch.empty(4, dtype=torch.bfloat16, device=name),
        "full": torch.full((2,), 7.0, device=name),
        "arange": torch.arange(3, device=name),
    }
    assert {tensor.device.type for tensor in made.values()} == {"cpu"}
    assert (made["tensor"].tolist(), made["full"].tolist(), made["arange"].tolist()) == ([1, 2], [7, 7], [0, 1, 2])
    assert (made["ones"].dtype, made["empty"].dtype, made["zeros"].shape) == (torch.int32, torch.bfloat16, (2, 3))
    assert torch.zeros.__name__ == "zeros"


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_tensors_and_modules_stay(name):
    x = torch.randn(3)
    assert x.cuda() is x and x.cuda(0, non_blocking=True) is x
    assert x.to(name) is x and x.to(device=name) is x
    half = x.to(name, torch.float16)
    assert (half.dtype, half.device.type) == (torch.float16, "cpu")
    assert x.to(device=name, dtype=torch.float64).dtype == torch.float64
    assert x.to(torch.int64).dtype == torch.int64 and x.to("meta").device.type == "meta"
    module = torch.nn.Linear(2, 2)
    assert module.cuda() is module and module.to(name).weight.device.type == "cpu"


def test_with_torch_device_meta_still_works():
    with torch.device("meta"):
        made = [
            torch.zeros(2),
            torch.ones(2),
            torch.empty(2),
            torch.full((2,), 1.0),
            torch.arange(2),
            torch.tensor([1]),
        ]
        made.append(torch.nn.Linear(2, 2).weight)
    assert {tensor.device.type for tensor in made} == {"meta"}
    with torch.device("cpu"):
        assert torch.zeros(2).device.type == "cpu"


def test_streams_are_already_in_order():
    stream = torch.cuda.Stream()
    for made in (stream, torch.cuda.current_stream(), torch.cuda.default_stream(), torch.cuda.Stream(0, priority=-1)):
        made.wait_stream(stream)
        made.synchronize()
        made.wait_event(None)
        made.record_event()
    with torch.cuda.stream(stream), stream:
        assert torch.ones(2).sum() == 2
    torch.cuda.synchronize()
    torch.cuda.synchronize(0)
    assert torch.cuda.is_current_stream_capturing() is False


def called_from(module: str, tensor: torch.Tensor) -> str:
    """Return `tensor.type()` as code of `module` sees it."""
    function = FunctionType((lambda t: t.type()).__code__, {"__name__": module})
    return function(tensor)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "FloatTensor"), (torch.bfloat16, "BFloat16Tensor"), (torch.float16, "HalfTensor")],
)
def test_type_names_are_cuda_for_megatron_core_only(dtype, name):
    x = torch.zeros(1, dtype=dtype)
    assert called_from("megatron.core.optimizer.optimizer", x) == f"torch.cuda.{name}"
    assert called_from("megatron_vlmr1.models.vlm", x) == f"torch.{name}"
    assert called_from("transformers.modeling_utils", x) == f"torch.{name}"
    assert x.type() == f"torch.{name}"
    assert x.type(torch.int32).dtype == torch.int32  # the conversion is as ever


def test_typed_constructors():
    assert torch.cuda.FloatTensor([1.5]).dtype == torch.float32
    assert torch.cuda.LongTensor([1]).dtype == torch.int64
    assert torch.cuda.IntTensor([1]).dtype == torch.int32


def test_the_cpu_generator_takes_the_part_of_the_cuda_one():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    assert torch.equal(state, torch.get_rng_state())
    first = torch.rand(3)
    torch.cuda.set_rng_state(state, 0)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_the_rng_tracker_forks_and_returns():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("mine", 2)
    with tracker.fork("mine"):
        forked = torch.rand(3)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), forked)
    assert not torch.equal(forked, after)


def test_a_barrier_takes_device_ids():
    from tests.distributed import ranks

    with ranks.alone():
        dist.barrier(device_ids=[0])
        dist.barrier()


def test_preparing_twice_changes_nothing():
    before = [getattr(where, name) for where, name in REDIRECTED]
    device.prepare_megatron()
    assert all(getattr(where, name) is old for (where, name), old in zip(REDIRECTED, before, strict=True))


def test_nothing_is_redirected_where_there_is_cuda(monkeypatch):
    called = []
    for name in [name for name in vars(device) if name.startswith("_redirect_")]:
        monkeypatch.setattr(device, name, lambda name=name: called.append(name))
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "_prepared", False)
    device.prepare_megatron()
    assert called == []
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    device.prepare_megatron()
    assert len(called) == 6


def test_modules_with_redirected_tensors_can_be_copied():
    module = torch.nn.Linear(2, 2).to("cuda")
    assert torch.equal(copy.deepcopy(module).weight, module.weight)


def mapped(address: int) -> bool:
    """Whether this process has memory there."""
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


@pytest.fixture
def locked(monkeypatch):
    """A machine with CUDA that notes which host memory is locked: address -> bytes."""
    held = {}

    def register(address, size, flags):
        assert isinstance(address, int) and flags == 0
        held[address] = size
        return 0 if size < 1 << 24 else 2

    def unregister(address):
        assert mapped(address)
        del held[address]

    cuda = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    return held


@pytest.mark.parametrize(("shape", "dtype"), [((3, 400_001), torch.float32), (1_200_007, torch.uint8)], ids=str)
def test_large_host_memory_is_locked_to_the_byte(locked, shape, dtype):
    """Not to the next power of two, as torch's own pinned memory is; given back with the last view."""
    tensor = device.host_empty(shape, dtype)
    assert tensor.shape == torch.empty(shape).shape and tensor.dtype is dtype and tensor.is_contiguous()
    assert locked == {tensor.data_ptr(): tensor.nbytes} and tensor.untyped_storage().nbytes() == tensor.nbytes
    tensor.fill_(7)
    last = tensor.view(-1)[-1:]
    del tensor
    gc.collect()
    assert len(locked) == 1 and last.item() == 7
    del last
    gc.collect()
    assert not locked


def test_host_memory_that_cuda_does_not_lock(locked):
    with pytest.raises(RuntimeError, match="CUDA could not lock 0.0 GB of host memory: cudaHostRegister says 2"):
        device.host_empty(1 << 24, torch.uint8)
