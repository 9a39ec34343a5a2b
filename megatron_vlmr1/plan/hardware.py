"""What a device and its links do in a second: peaks, and the shares of them that programs reach. A file each.

``configs/hardware/*.yaml`` holds every number with its source: published, assumed, measured or fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from megatron_vlmr1.config.section import PositiveFloat, PositiveInt, Section
from megatron_vlmr1.telemetry.files import write_atomic

Link = Literal["nvlink", "network", "pcie"]


class Number(Section):
    """A number, and who says so."""

    value: PositiveFloat
    source: Annotated[str, Field(pattern=r"^(published|assumed|measured|fitted)\b")]
    """Begins with published, assumed, measured or fitted."""


class Share(Number):
    """A share of a peak."""

    value: Annotated[float, Field(gt=0, le=1)]


class Peaks(Section):
    """FLOP/s of dense matrix products, by the type of their operands."""

    fp32: Number
    bf16: Number
    fp8: Number | None = None


class Efficiency(Section):
    """Shares of the peaks that programs reach. A matrix product's size class goes by its least dimension."""

    matmul_large: Share
    """At least 2048."""
    matmul_medium: Share
    """At least 512."""
    matmul_small: Share
    attention: Share
    """Of the FLOP/s, by useful (query, key) pairs."""
    memory: Share
    """Of the memory's bytes/s, in norms, activations, the optimizer."""
    decode: Share
    """Of the memory's bytes/s, in reads of weights and of the key/value cache while decoding."""
    nvlink: Share
    network: Share
    pcie: Share


class Overheads(Section):
    """Seconds that are needed whatever the size."""

    nvlink_latency_s: Number
    """Of one hop of a collective within a node."""
    network_latency_s: Number
    """Of one hop between nodes."""
    launch_s: Number
    """Of one kernel on the host, from Python."""
    tick_s: Number
    """Of one tick of generation on the host: sampling, the way of tokens to the host, bookkeeping."""
    step_s: Number
    """Of one step, outside generation and passes."""
    rewards_s: Number
    """From the last completion to the last score."""


class Hardware(Section):
    """A kind of device, the node that it is in, and a calibration."""

    name: str
    device: Literal["cuda", "cpu"]
    """cuda: kernels queue up while the host goes on; cpu: they are waited for."""
    devices_per_node: PositiveInt
    peak_flops: Peaks
    memory_bytes: Number
    """Of a device."""
    host_memory_bytes: Number
    """Of a node."""
    memory_bytes_per_s: Number
    nvlink_bytes_per_s: Number
    """Between devices of a node, each way, a device (whatever the link is called)."""
    network_bytes_per_s: Number
    """Between nodes, each way, a device."""
    pcie_bytes_per_s: Number
    """Between a device and its host, each way."""
    disk_bytes_per_s: Number
    """Of one node, writing checkpoints."""
    efficiency: Efficiency
    overheads: Overheads

    @cached_property
    def rates(self) -> dict[str, float]:
        """What can be reached, bytes/s: memory, decode, nvlink, network, pcie."""
        e = self.efficiency
        return {
            "memory": self.memory_bytes_per_s.value * e.memory.value,
            "decode": self.memory_bytes_per_s.value * e.decode.value,
            "nvlink": self.nvlink_bytes_per_s.value * e.nvlink.value,
            "network": self.network_bytes_per_s.value * e.network.value,
            "pcie": self.pcie_bytes_per_s.value * e.pcie.value,
        }

    @cached_property
    def matmul_shares(self) -> tuple[float, float, float]:
        """Of large, medium and small matrix products."""
        e = self.efficiency
        return e.matmul_large.value, e.matmul_medium.value, e.matmul_small.value

    def peak(self, precision: str) -> float:
        """Return FLOP/s of matrix products.

        Raises:
            ValueError: the device has no such type.
        """
        number = getattr(self.peak_flops, precision)
        if number is None:
            raise ValueError(f"{self.name} has no {precision}")
        return float(number.value)


CALIBRATED = tuple(f"efficiency.{name}" for name in Efficiency.model_fields) + tuple(
    f"overheads.{name}" for name in Overheads.model_fields
)
"""Dotted names of what a calibration sets; the rest is what the hardware is."""


def number(hardware: Hardware, name: str) -> float:
    """Return a calibrated number by its dotted name."""
    section, key = name.split(".")
    return float(getattr(getattr(hardware, section), key).value)


def calibrated(hardware: Hardware, values: Mapping[str, float], source: str) -> Hardware:
    """Return the hardware with other calibrated numbers, by dotted name.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    raw = hardware.model_dump(exclude_none=True)
    for name, value in values.items():
        if name not in CALIBRATED:
            raise ValueError(f"{name} is not a calibrated number; known: {', '.join(CALIBRATED)}")
        section, key = name.split(".")
        raw[section][key] = {"value": float(value), "source": source}
    return _validated(raw, hardware.name)


def read(path: Path) -> Hardware:
    """Read a file of ``configs/hardware``.

    Raises:
        ValueError: it is missing, broken, or lacks a number; one line.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a readable hardware file: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a hardware file is a mapping")
    return _validated(raw, str(path))


def write(hardware: Hardware, path: Path) -> None:
    """Write a file that `read` reads, each number with its source."""
    text = yaml.safe_dump(hardware.model_dump(exclude_none=True), sort_keys=False, width=120)
    write_atomic(path, text.encode())


def _validated(raw: dict[str, Any], origin: str) -> Hardware:
    try:
        return Hardware.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{origin}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
