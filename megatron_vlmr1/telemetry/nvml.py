"""Readings of the node's GPUs and of this process, for the metrics."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import psutil


def read_devices() -> list[dict[str, float]]:
    """Return one dict per GPU that NVML shows: util (percent), mem_bytes, power_w, temp_c.

    A reading that the device does not support is left out. Without NVML or a driver the list is empty.
    """
    library = _nvml()
    if library is None:
        return []
    readings = {
        "util": lambda device: library.nvmlDeviceGetUtilizationRates(device).gpu,
        "mem_bytes": lambda device: library.nvmlDeviceGetMemoryInfo(device).used,
        "power_w": lambda device: library.nvmlDeviceGetPowerUsage(device) / 1000,  # milliwatts
        "temp_c": lambda device: library.nvmlDeviceGetTemperature(device, library.NVML_TEMPERATURE_GPU),
    }
    devices: list[dict[str, float]] = []
    with suppress(library.NVMLError):  # a device that fell off the bus must not end the run that reads its temperature
        for index in range(library.nvmlDeviceGetCount()):
            device = library.nvmlDeviceGetHandleByIndex(index)
            devices.append({})
            for name, read in readings.items():
                with suppress(library.NVMLError_NotSupported):
                    devices[-1][name] = float(read(device))
    return devices


def device_metrics() -> dict[str, float]:
    """Return ``gpu/{util,mem_bytes,power_w,temp_c}`` of this node and ``host/rss_bytes`` of this process.

    Utilisation is the mean over the GPUs (percent), power their sum, memory and temperature the largest.
    """
    metrics = {"host/rss_bytes": float(psutil.Process().memory_info().rss)}
    columns: dict[str, list[float]] = {}
    for device in read_devices():
        for name, value in device.items():
            columns.setdefault(name, []).append(value)
    for name, values in columns.items():
        joined = sum(values) / len(values) if name == "util" else sum(values) if name == "power_w" else max(values)
        metrics[f"gpu/{name}"] = joined
    return metrics


@cache
def _nvml() -> Any:
    """The initialised library, or None where there is none."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
