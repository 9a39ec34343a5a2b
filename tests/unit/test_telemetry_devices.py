"""Readings of GPUs (a fake NVML) and of the host, sampled beside the training."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vlmr1.telemetry import host, lines, nvml
from megatron_vlmr1.telemetry import sampler as sampler_module
from megatron_vlmr1.telemetry.progress import here
from megatron_vlmr1.telemetry.sampler import Sampler, node_file
from tests.fake_nvml import FakeNvml

READINGS = {
    "util": 40,
    "mem_bytes": 10 << 30,
    "power_w": 350,
    "temp_c": 50,
    "sm_mhz": 1900,
    "mem_mhz": 2600,
    "throttle_reasons": 0,
    "ecc_corrected": 7,
    "ecc_uncorrected": 0,
    "energy_j": 5000,
    "nvlink_tx_bytes": 1024_000,
    "nvlink_rx_bytes": 1024_000,
    "pcie_tx_bytes": 4000,
    "pcie_rx_bytes": 4000,
}
PCIE_ONLY = {"milliwatts": None, "millijoules": None, "nvlink_kib": None, "util": 60, "celsius": 51}


def use(monkeypatch: pytest.MonkeyPatch, *gpus: dict[str, Any] | None) -> FakeNvml:
    fake = FakeNvml(*gpus)
    monkeypatch.setattr(nvml, "library", lambda: fake)
    return fake


def test_every_reading_in_its_unit_and_those_that_are_not_supported_left_out(monkeypatch) -> None:
    use(monkeypatch, {}, PCIE_ONLY, None)
    whole, partly, lost = nvml.read_devices()
    assert whole == READINGS
    left_out = {"power_w", "energy_j", "nvlink_tx_bytes", "nvlink_rx_bytes"}
    assert partly == {k: v for k, v in READINGS.items() if k not in left_out} | {"util": 60, "temp_c": 51}
    assert lost == {"lost": 1}


def test_nothing_without_nvml(monkeypatch, caplog, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml.library.cache_clear()
    assert nvml.read_devices() == [] and nvml.read_health() == [] and nvml.driver_version() == ""
    assert not caplog.records
    nvml.library.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "sick"),
    [
        ({}, {}),
        ({"uncorrected": 2}, {"ecc_uncorrected": 2}),
        ({"reasons": 0x08 | 0x40 | 0x04}, {"throttled": ("hardware slowdown", "hardware thermal slowdown")}),
        ({"rows": (0, 1, 0, 1)}, {"row_trouble": "a row of its memory could not be remapped"}),
        ({"rows": (0, 1, 1, 0)}, {"row_trouble": "rows of its memory wait to be replaced; reset the GPU"}),
        ({"rows": None, "reasons": None, "uncorrected": None, "sm_mhz": None}, {"sm_mhz": 0}),
    ],
)
def test_health(monkeypatch, gpu, sick) -> None:
    use(monkeypatch, {}, gpu)
    well = {"name": "H100", "sm_mhz": 1900, "sm_max_mhz": 1980, "mem_free": 70 << 30, "mem_total": 80 << 30}
    expected = nvml.Health(1, "GPU-1", **{**well, **sick})
    assert nvml.read_health() == [nvml.Health(0, "GPU-0", **well), expected]
    assert nvml.read_health("GPU-1") == [expected]


def test_a_slowdown_of_a_moment_is_none(monkeypatch) -> None:
    fake = use(monkeypatch, {})
    monkeypatch.setattr(nvml, "_LOOK_S", 0.0)
    for said, lasting in (([8, 0], ()), ([0x48, 0x40, 0x48], ("hardware thermal slowdown",))):
        left = iter(said)
        monkeypatch.setattr(fake, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda gpu, left=left: next(left))
        assert nvml.read_health()[0].throttled == lasting


def test_health_of_a_gpu_that_fell_off_the_bus(monkeypatch) -> None:
    use(monkeypatch, None)
    assert nvml.read_health() == [nvml.Health(0, lost="GPU is lost")]


def test_metrics_of_a_step(monkeypatch, tmp_path: Path) -> None:
    fake = use(monkeypatch, {}, {"util": 60, "celsius": 55, "used": 20 << 30})
    sampler = Sampler(tmp_path, "n1", 0)
    first = sampler.step_metrics(sampler.take())
    assert "gpu/energy_j" not in first  # since when is not known
    sampler.sample()
    fake.gpus[0] |= {"util": 0, "millijoules": 5_300_000, "reasons": 0x40}
    fake.gpus[1] = None
    samples = sampler.take()
    metrics = sampler.step_metrics(samples)
    assert len(samples) == 2 and 0 <= metrics.pop("host/cpu_util") <= 100
    assert metrics == {
        "gpu/util": pytest.approx((40 + 60 + 0) / 3),
        "gpu/mem_bytes": 20 << 30,
        "gpu/power_w": (700 + 350) / 2,
        "gpu/temp_c": 55,
        "gpu/throttled": 1,
        "gpu/lost": 1,
        "gpu/energy_j": 300,
    }
    assert not (tmp_path / "telemetry").exists()  # with sample_s=0 there is no file


def test_samples_carry_step_and_phase_and_rates(monkeypatch, tmp_path: Path) -> None:
    fake = use(monkeypatch, {})
    monkeypatch.setattr(here, "step", 3)
    monkeypatch.setattr(here, "phase", "rollout")
    clock = iter([1000.0, 1002.0, 1004.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    sampler = Sampler(tmp_path, "../n 1", 1e6)  # the thread takes the first sample, and then sleeps
    while not sampler._fresh:
        time.sleep(0.01)
    fake.gpus[0] |= {"nvlink_kib": 3000, "pcie_bytes": 1000}  # the second one wrapped
    monkeypatch.setattr(here, "phase", "update")
    sampler.sample()
    sampler.close()
    assert node_file(tmp_path, "../n 1").parent == tmp_path / "telemetry"
    rows = [json.loads(line) for line in node_file(tmp_path, "../n 1").read_text().splitlines()]
    assert [(row["unix_s"], row["step"], row["phase"]) for row in rows] == [(1000, 3, "rollout"), (1002, 3, "update")]
    gpu = rows[1]["gpus"][0]
    assert gpu["nvlink_tx_bytes_s"] == 2000 * 1024 / 2 and "pcie_tx_bytes_s" not in gpu
    assert {"cpu_util", "mem_bytes", "rss_bytes", "disk_free_bytes", "net_tx_bytes_s"} <= rows[1]["host"].keys()
    assert "net_tx_bytes_s" not in rows[0]["host"]


def test_a_host_that_cannot_be_read_is_told_once(monkeypatch, tmp_path: Path, caplog) -> None:
    def fail(self: object) -> None:
        raise OSError("no /proc")

    monkeypatch.setattr(host.HostReader, "read", fail)
    sampler = Sampler(tmp_path, "n", 0)
    assert sampler.step_metrics(sampler.take()) == {} == sampler.step_metrics(sampler.take())
    assert len(caplog.records) == 1 and "no /proc" in caplog.text


def test_a_step_without_a_sample_repeats_the_last_one(monkeypatch, tmp_path: Path) -> None:
    use(monkeypatch, {})
    sampler = Sampler(tmp_path, "n", 0)
    sampler.step_metrics(sampler.take())
    sampler._period_s = 1e6  # from here on as with a thread that has not come round
    metrics = sampler.step_metrics(sampler.take())
    assert metrics["gpu/util"] == 40 and metrics["gpu/energy_j"] == 0
    sampler._told["unix_s"] -= 10.1e6  # the driver hangs: what was is not what is
    assert sampler.step_metrics(sampler.take()) == {}


def test_the_first_utilisation_is_one_in_a_thread_too(tmp_path: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval=None: asked.append(interval) or 50.0)
    reader = host.HostReader(tmp_path, 0.1)
    reader.read(), reader.read()
    assert asked == [0.1, None]  # without an interval psutil's first answer in a thread is 0
    asked.clear()
    host.HostReader(tmp_path, 0).read()
    assert asked == [None, None]  # the first one when it is made: a step does not wait


def test_no_failure_to_read_ends_the_samples(monkeypatch, tmp_path: Path) -> None:
    ends = iter([AttributeError("NVML_FI_DEV_PCIE_COUNT_TX_BYTES"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "")])

    def read() -> list[dict[str, float]]:
        if (error := next(ends, None)) is not None:
            raise error
        return []

    monkeypatch.setattr(nvml, "read_devices", read)
    sampler = Sampler(tmp_path, "n", 0.01)
    until = time.monotonic() + 20
    while not (samples := sampler.take()) and time.monotonic() < until:
        time.sleep(0.01)
    sampler.close()
    assert samples and samples[0]["gpus"] == []


def test_leaving_does_not_wait_for_a_disk_that_hangs(monkeypatch, tmp_path: Path) -> None:
    hangs, begun = threading.Event(), threading.Event()

    def append(path: Path, data: bytes) -> None:
        begun.set()
        hangs.wait(20)

    monkeypatch.setattr(lines, "append_whole", append)
    monkeypatch.setattr(sampler_module, "_LEAVE_S", 0.01)
    sampler = Sampler(tmp_path, "n", 1e6)
    assert begun.wait(20)
    sampler.close()
    assert not hangs.is_set() and sampler._lines.unwritten == 1
    hangs.set()
    sampler._thread.join(20)
    assert sampler._lines.unwritten == 0
