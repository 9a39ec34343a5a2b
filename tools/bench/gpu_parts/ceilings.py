"""What the card reaches: matrix products, copies, launches. All else is held against these."""

from __future__ import annotations

import time
from functools import partial

import torch

from megatron_vlmr1.models import fp8
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import device
from megatron_vlmr1.telemetry.flops import peak_flops
from tools.bench.gpu_parts import models
from tools.bench.gpu_parts.measuring import Bench, NotMeasured, Row

Sides = tuple[int, int, int]  # m, n, k of [m, k] x [k, n]

_TOKENS = 8192  # of a micro-batch
# By the least side, as `plan.hardware.Efficiency` has it; weights that do not fit a cache.
_MEDIUM, _SMALL = (1024, 8192, 8192), (256, 8192, 8192)
_COPY_BYTES = 2 << 30
_LAUNCHES, _ROUNDS = 200, 10


def measure(bench: Bench, mesh: Mesh) -> None:
    """Measure them all."""
    del mesh  # only parts that build models need it
    squares = (64, 128) if bench.tiny else (4096, 8192, 16384)
    for n in squares:
        _product(bench, f"bf16 {n} x {n} x {n}", [(n, n, n)])
    for size in models.sizes(bench):
        if row := _product(bench, f"bf16 products of a {size} layer", _of_a_layer(bench, size)):
            bench.rates["matmul_large"] = max(row.figures["flop_per_s"], bench.rates.get("matmul_large", 0.0))
        _product(bench, f"bf16 output layer of {size}", [_of_the_head(bench, size)])
    for rate, sides in (("matmul_medium", _MEDIUM), ("matmul_small", _SMALL)):
        if row := _product(bench, f"bf16 {' x '.join(map(str, _small(bench, sides)))}", [_small(bench, sides)]):
            bench.rates[rate] = row.figures["flop_per_s"]
    for n in squares:
        _product(bench, f"fp8 {n} x {n} x {n}", [(n, n, n)], in_fp8=True)
    for size in models.sizes(bench):
        _product(bench, f"fp8 products of a {size} layer", _of_a_layer(bench, size), in_fp8=True)
    for name, how in _COPIES.items():
        if row := bench.case(f"copy, {name}", partial(how, bench), 2):
            _keep_copy(bench, name, row.figures["bytes_per_s"])
    if row := bench.case("launch of a kernel", partial(_launch, bench), 2):
        bench.rates["launch"] = row.figures["s"]


def _small(bench: Bench, sides: Sides) -> Sides:
    return tuple(side // 32 for side in sides) if bench.tiny else sides  # type: ignore[return-value]


def _of_a_layer(bench: Bench, size: str) -> list[Sides]:
    """Return the products of one layer in a micro-batch."""
    tokens = 128 if bench.tiny else _TOKENS
    text = models.shape(bench, size).text
    return [(tokens, rows, columns) for rows, columns in fp8.matrices(text, 1).values()]


def _of_the_head(bench: Bench, size: str) -> Sides:
    text = models.shape(bench, size).text
    return (128 if bench.tiny else 4096), text.vocab_size, text.hidden_size


def _product(bench: Bench, name: str, sizes: list[Sides], in_fp8: bool = False) -> Row | None:
    row = bench.case(name, partial(_products, bench, sizes, in_fp8), 2)
    if row is not None:
        kind = "fp8" if in_fp8 else "bf16"
        bench.ceilings[kind] = max(row.figures["flop_per_s"], bench.ceilings.get(kind, 0.0))
    return row


def _products(bench: Bench, sizes: list[Sides], in_fp8: bool) -> Row:
    """Time products one after another, each by itself."""
    seconds = sum(_seconds(bench, sides, in_fp8) for sides in sizes)
    flops = sum(2.0 * m * n * k for m, n, k in sizes)
    moved = sum(float((m * k + k * n) * (1 if in_fp8 else 2) + 2 * m * n) for m, n, k in sizes)
    figures = {"flop_per_s": flops / seconds, "s": seconds}
    if peak := peak_flops(device.name(), "fp8" if in_fp8 else "bf16"):
        figures["of_data_sheet"] = flops / seconds / peak
    return Row(figures, ", ".join(f"{m} x {k} by {k} x {n}" for m, n, k in sizes), flops, moved, seconds)


def _seconds(bench: Bench, sides: Sides, in_fp8: bool) -> float:
    m, n, k = sides
    if not in_fp8:
        a, b = (torch.randn(size, device=device.device(), dtype=torch.bfloat16) for size in ((m, k), (n, k)))
        out = torch.empty(m, n, device=device.device(), dtype=torch.bfloat16)
        return bench.seconds(lambda: torch.mm(a, b.t(), out=out))
    if not bench.cuda or device.capability() < (8, 9):
        raise NotMeasured(f"FP8 needs a GPU of compute capability 8.9; this is {device.name() or 'a CPU'}")
    one = torch.ones((), device=device.device())
    c, d = (torch.randn(size, device=device.device()).to(torch.float8_e4m3fn) for size in ((m, k), (n, k)))
    return bench.seconds(lambda: torch._scaled_mm(c, d.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True))


def _random_bytes(size: int) -> torch.Tensor:
    """Return bytes as hard to move as any: zeros can be quicker."""
    return torch.empty(size, dtype=torch.uint8, device=device.device()).random_()


def _on_device(bench: Bench) -> Row:
    """Copy within the device's memory: each byte is read and written."""
    size = 1 << 20 if bench.tiny else _COPY_BYTES
    a, b = (_random_bytes(size) for _ in range(2))
    seconds = bench.seconds(lambda: b.copy_(a))
    return Row({"bytes_per_s": 2 * size / seconds}, f"{size >> 20} MiB, read and written")


def _read(bench: Bench) -> Row:
    """Add up numbers: each byte is read."""
    size = 1 << 20 if bench.tiny else _COPY_BYTES
    a = torch.randn(size // 4, device=device.device())
    seconds = bench.seconds(a.sum)
    return Row({"bytes_per_s": size / seconds}, f"{size >> 20} MiB, read and added up")


def _over_the_bus(bench: Bench, to_host: bool) -> Row:
    if not bench.cuda:
        raise NotMeasured("a CPU has no bus to itself")
    size = _COPY_BYTES // 4
    held = _random_bytes(size)
    host = device.host_empty(size, torch.uint8)
    source, target = (held, host) if to_host else (host, held)
    seconds = bench.seconds(lambda: target.copy_(source, non_blocking=True))
    return Row({"bytes_per_s": size / seconds}, f"{size >> 20} MiB, pinned host memory")


_COPIES = {
    "device to device": _on_device,
    "device, read only": _read,
    "host to device": partial(_over_the_bus, to_host=False),
    "device to host": partial(_over_the_bus, to_host=True),
}


def _keep_copy(bench: Bench, name: str, rate: float) -> None:
    if name == "device to device":
        bench.ceilings["copy"] = bench.rates["memory"] = rate
    elif "host" in name:
        bench.rates["pcie"] = min(rate, bench.rates.get("pcie", rate))


def _launch(bench: Bench) -> Row:
    """Time the host, from Python, while it hands the device small kernels that it need not wait for."""
    x = torch.zeros(1, device=device.device())
    found = []
    for _ in range(_ROUNDS):
        bench.wait()
        begin = time.perf_counter()
        for _ in range(_LAUNCHES):
            x.add_(1.0)
        found.append((time.perf_counter() - begin) / _LAUNCHES)
    bench.wait()
    return Row({"s": min(found)}, f"{_LAUNCHES} additions to one number, on the host, the least of {_ROUNDS}")
