"""NVML's bindings for GPUs that are not there; each has a dict of what it says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

WELL: dict[str, Any] = {
    "util": 40,
    "used": 10 << 30,
    "total": 80 << 30,
    "milliwatts": 350_000,
    "celsius": 50,
    "sm_mhz": 1900,
    "reasons": 0,
    "uncorrected": 0,
    "millijoules": 5_000_000,
    "nvlink_kib": 1000,
    "pcie_bytes": 4000,
    "rows": (0, 0, 0, 0),
}


class FakeNvml:
    """Stands in for the module `pynvml`. A reading that is None is not supported; a GPU that is None is lost."""

    NVML_TEMPERATURE_GPU = NVML_VOLATILE_ECC = 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES, NVML_FI_DEV_PCIE_COUNT_RX_BYTES = 197, 198

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801 - the library's name
        pass

    def __init__(self, *gpus: dict[str, Any] | None) -> None:
        self.gpus = [None if gpu is None else {**WELL, **gpu} for gpu in gpus]

    def _say(self, gpu: int, name: str) -> Any:
        said = self.gpus[gpu]
        if said is None:
            raise self.NVMLError("GPU is lost")
        if said[name] is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return said[name]

    def nvmlSystemGetDriverVersion(self):
        return "550.54"

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetIndex(self, gpu):
        return gpu

    def nvmlDeviceGetUUID(self, gpu):
        return f"GPU-{gpu}"

    def nvmlDeviceGetName(self, gpu):
        return "H100"

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=self._say(gpu, "util"))

    def nvmlDeviceGetMemoryInfo(self, gpu):
        used, total = self._say(gpu, "used"), self._say(gpu, "total")
        return SimpleNamespace(used=used, total=total, free=total - used)

    def nvmlDeviceGetPowerUsage(self, gpu):
        return self._say(gpu, "milliwatts")

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return self._say(gpu, "celsius")

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return self._say(gpu, "sm_mhz") if kind == self.NVML_CLOCK_SM else 2600

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        return self._say(gpu, "reasons")

    def nvmlDeviceGetTotalEccErrors(self, gpu, kind, counter):
        return self._say(gpu, "uncorrected") if kind == self.NVML_MEMORY_ERROR_TYPE_UNCORRECTED else 7

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        return self._say(gpu, "millijoules")

    def nvmlDeviceGetRemappedRows(self, gpu):
        return self._say(gpu, "rows")

    def nvmlDeviceGetRetiredPagesPendingStatus(self, gpu):
        raise self.NVMLError_NotSupported("Not Supported")

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return []

    def nvmlDeviceGetFieldValues(self, gpu, fields):
        ids = [field[0] if isinstance(field, tuple) else field for field in fields]
        names = {138: "nvlink_kib", 139: "nvlink_kib", 197: "pcie_bytes", 198: "pcie_bytes"}
        said = [self.gpus[gpu][names[field]] for field in ids]
        return [
            SimpleNamespace(nvmlReturn=3 if value is None else 0, value=SimpleNamespace(ullVal=value or 0))
            for value in said
        ]
