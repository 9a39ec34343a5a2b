"""Readings of the node's GPUs: what they do now, and whether they are well. Without NVML or a driver there are none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

_ALL_LINKS = 0xFFFFFFFF  # of a field that NVML has per NVLink
# Reasons for clocks below what was asked for that mean that something is wrong with the device or its cooling.
HARDWARE_THROTTLING = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_HARDWARE_BITS = sum(HARDWARE_THROTTLING)

_LOOKS, _LOOK_S = 3, 0.05  # at why a device is slowed down, and between them

Reading = Callable[[Any, Any], float]

# NVML's library and a device's handle to a number. Cumulative ones are marked by their place in COUNTERS.
_LEVELS: Mapping[str, Reading] = {
    "util": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "mem_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,  # milliwatts
    "temp_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "mem_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "throttle_reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
    "ecc_corrected": lambda nvml, gpu: _ecc(nvml, gpu, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
    "ecc_uncorrected": lambda nvml, gpu: _ecc(nvml, gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
    "energy_j": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000,  # millijoules since the start
}
# Bytes since the driver was loaded: NVML's field, whether it is one of links, and bytes of a unit.
_TRAFFIC = {
    "nvlink_tx_bytes": ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", True, 1024),
    "nvlink_rx_bytes": ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", True, 1024),
    "pcie_tx_bytes": ("NVML_FI_DEV_PCIE_COUNT_TX_BYTES", False, 1),
    "pcie_rx_bytes": ("NVML_FI_DEV_PCIE_COUNT_RX_BYTES", False, 1),
}
COUNTERS = tuple(_TRAFFIC)  # readings whose difference over time is a rate


@dataclass(frozen=True)
class Health:
    """What tells a sick GPU.

    Attributes:
        index: as NVML counts, which is not CUDA's order.
        uuid: "GPU-…".
        lost: NVML's words where the device does not answer; nothing else is known then.
        ecc_uncorrected: errors since the driver was loaded.
        row_trouble: "" or what is wrong with rows of memory that were to be replaced.
        throttled: reasons of the hardware for low clocks now, as in `HARDWARE_THROTTLING`.
        sm_mhz: clock now; an idle device is slow by itself.
        sm_max_mhz: the highest it can have.
        mem_free: bytes.
        mem_total: bytes.
        processes: ids of processes that compute on it, in the view of this process's container.
    """

    index: int
    uuid: str = ""
    name: str = ""
    lost: str = ""
    ecc_uncorrected: int = 0
    row_trouble: str = ""
    throttled: tuple[str, ...] = ()
    sm_mhz: int = 0
    sm_max_mhz: int = 0
    mem_free: int = 0
    mem_total: int = 0
    processes: tuple[int, ...] = ()


def read_devices() -> list[dict[str, float]]:
    """Return one dict per GPU: util (percent), mem_bytes, power_w, temp_c, sm_mhz, mem_mhz, throttle_reasons (bits),
    ecc_corrected, ecc_uncorrected, energy_j, and the bytes of `COUNTERS`.

    A reading that the device does not support is left out. One that does not answer at all is ``{"lost": 1}``.
    """
    nvml = library()
    return [] if nvml is None else [_read(nvml, index) for index in range(_count(nvml))]


def read_health(uuid: str | None = None) -> list[Health]:
    """Return the health of all GPUs, or of the one with this `uuid`; of none where NVML has no such one (MIG)."""
    nvml = library()
    if nvml is None:
        return []
    if uuid is None:
        return [_health(nvml, index) for index in range(_count(nvml))]
    try:
        return [_health(nvml, int(nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(uuid))))]
    except nvml.NVMLError:
        return []


def driver_version() -> str:
    """Return the driver's version, "" without one."""
    nvml = library()
    if nvml is None:
        return ""
    with suppress(nvml.NVMLError):
        return _text(nvml.nvmlSystemGetDriverVersion())
    return ""


def is_throttled(reasons: float) -> bool:
    """Whether bits of `throttle_reasons` hold one of `HARDWARE_THROTTLING`."""
    return bool(int(reasons) & _HARDWARE_BITS)


@cache
def library() -> Any:
    """Return the initialised NVML bindings, or None where there is no NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _count(nvml: Any) -> int:
    with suppress(nvml.NVMLError):
        return int(nvml.nvmlDeviceGetCount())
    return 0


def _read(nvml: Any, index: int) -> dict[str, float]:
    """Whatever a device does, the run that reads its temperature must go on."""
    try:
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceGetMemoryInfo(gpu)  # every device has it: one that has not is gone
    except nvml.NVMLError:
        return {"lost": 1.0}
    readings: dict[str, float] = {}
    for name, read in _LEVELS.items():
        with suppress(nvml.NVMLError):
            readings[name] = float(read(nvml, gpu))
    with suppress(nvml.NVMLError):
        readings |= _traffic(nvml, gpu)
    return readings


def _traffic(nvml: Any, gpu: Any) -> dict[str, float]:
    fields = [
        (getattr(nvml, field), _ALL_LINKS) if of_links else getattr(nvml, field)
        for field, of_links, _ in _TRAFFIC.values()
    ]
    values = nvml.nvmlDeviceGetFieldValues(gpu, fields)
    pairs = zip(_TRAFFIC.items(), values, strict=True)
    return {name: float(v.value.ullVal * unit) for (name, (_, _, unit)), v in pairs if v.nvmlReturn == 0}


def _ecc(nvml: Any, gpu: Any, kind: Any) -> float:
    return float(nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, nvml.NVML_VOLATILE_ECC))


def _health(nvml: Any, index: int) -> Health:
    try:
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
    except nvml.NVMLError as error:
        return Health(index, lost=str(error) or type(error).__name__)
    get = _Getter(nvml)
    return Health(
        index=index,
        uuid=_text(get("", nvml.nvmlDeviceGetUUID, gpu)),
        name=_text(get("", nvml.nvmlDeviceGetName, gpu)),
        ecc_uncorrected=int(get(0, lambda: _ecc(nvml, gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED))),
        row_trouble=_row_trouble(nvml, gpu, get),
        throttled=_throttled(nvml, gpu, get),
        sm_mhz=int(get(0, nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM)),
        sm_max_mhz=int(get(0, nvml.nvmlDeviceGetMaxClockInfo, gpu, nvml.NVML_CLOCK_SM)),
        mem_free=int(memory.free),
        mem_total=int(memory.total),
        processes=tuple(int(p.pid) for p in get((), nvml.nvmlDeviceGetComputeRunningProcesses, gpu)),
    )


def _throttled(nvml: Any, gpu: Any, get: _Getter) -> tuple[str, ...]:
    """The reasons that last: NVML may show a slowdown for a moment while clocks change."""
    reasons = _HARDWARE_BITS
    for look in range(_LOOKS):
        time.sleep(_LOOK_S if look else 0.0)
        reasons &= int(get(0, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu))
        if not reasons:
            break
    return tuple(words for bit, words in HARDWARE_THROTTLING.items() if reasons & bit)


class _Getter:
    """Calls NVML, and returns a default where the device does not support the call."""

    def __init__(self, nvml: Any) -> None:
        self._error = nvml.NVMLError

    def __call__(self, default: Any, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except self._error:
            return default


def _row_trouble(nvml: Any, gpu: Any, get: _Getter) -> str:
    """Rows are remapped since Ampere; older devices retire pages. Either waits for a reset of the device."""
    _, _, pending, failed = get((0, 0, 0, 0), nvml.nvmlDeviceGetRemappedRows, gpu)
    if failed:
        return "a row of its memory could not be remapped"
    if pending or get(0, nvml.nvmlDeviceGetRetiredPagesPendingStatus, gpu):
        return "rows of its memory wait to be replaced; reset the GPU"
    return ""


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
