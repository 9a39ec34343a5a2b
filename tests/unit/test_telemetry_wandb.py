"""Weights & Biases that hangs, raises or works, as a module of that name: a step never waits for it."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1.telemetry import wandb_sink
from megatron_vlmr1.telemetry.metrics import MetricsWriter, read_metrics
from megatron_vlmr1.telemetry.wandb_sink import WandbSink

STEP_S = 0.15  # of the tiny model
SHARE = 0.02


class FakeWandb:
    """Stands in for the module and for its run."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = threading.Event()
        self.broken_inits = 0
        self.broken_steps: set[int] = set()

    def init(self, **settings: Any) -> FakeWandb:
        self.inits.append(settings)
        assert self.gate.wait(60)
        if self.broken_inits >= len(self.inits):
            raise ConnectionError("api.wandb.ai is unreachable")
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step in self.broken_steps:
            raise RuntimeError("no")
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished.set()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(wandb_sink, "_RETRY_S", 0.01)
    return fake


def test_all_steps_arrive_in_order(tmp_path: Path, fake: FakeWandb) -> None:
    fake.gate.set()
    writer = MetricsWriter(tmp_path, WandbSink("mine", tmp_path, {"seed": 0}))
    for step in range(50):
        writer.write(step, {"x": float(step)})
    writer.close()
    assert [(step, metrics["x"]) for step, metrics in fake.logged] == [(step, float(step)) for step in range(50)]
    assert fake.finished.is_set()
    [settings] = fake.inits
    assert (settings["project"], settings["config"], settings["resume"]) == ("mine", {"seed": 0}, "allow")
    again = WandbSink("mine", tmp_path, {})
    again.close()
    assert fake.inits[1]["id"] == settings["id"]


def test_steps_do_not_wait_for_one_that_hangs(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_sink, "_MAX_WAITING", 8)
    monkeypatch.setattr(wandb_sink, "_LEAVE_S", 0.1)
    writer = MetricsWriter(tmp_path, WandbSink("mine", tmp_path, {}))
    start = time.perf_counter()
    for step in range(100):
        writer.write(step, {"x": float(step)})
    each = (time.perf_counter() - start) / 100
    assert each < SHARE * STEP_S, each
    writer.close()
    rows = read_metrics(tmp_path)
    assert [step for step, _ in rows] == list(range(100))
    assert rows[-1][1]["telemetry/lost_points"] == 99 - 8
    assert len(caplog.records) == 1 and "too slow" in caplog.text
    fake.gate.set()
    assert fake.finished.wait(60)


def test_one_that_is_unreachable_at_first_gets_what_waited(
    tmp_path: Path, fake: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    fake.broken_inits, fake.broken_steps = 3, {1}
    sink = WandbSink("mine", tmp_path, {})
    for step in range(3):
        sink.write(step, {"x": 0.0})
    fake.gate.set()
    while len(fake.inits) < 4:
        time.sleep(0.01)
    sink.close()
    assert [step for step, _ in fake.logged] == [0, 2] and sink.dropped == 1
    assert len(caplog.records) == 1 and "unreachable" in caplog.text


def test_one_that_stays_unreachable_is_left_at_the_end(tmp_path: Path, fake: FakeWandb) -> None:
    fake.broken_inits = 10**6
    fake.gate.set()
    sink = WandbSink("mine", tmp_path, {})
    sink.close()
    assert not sink._thread.is_alive() and not fake.logged


def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="wandb is not installed"):
        wandb_sink.check_installed("p")
    (tmp_path / "wandb/__init__.py").touch()
    wandb_sink.check_installed("p")


def test_wandbs_own_process_does_not_outlive_the_sink(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "_LEAVE_S", 0.1)
    sleeper = Path(shutil.copy(shutil.which("sleep") or "", tmp_path / "wandb-core"))
    with subprocess.Popen([sleeper, "600"]) as service:
        WandbSink("mine", tmp_path, {}).close()  # it never came to begin
        assert service.wait(10) == -signal.SIGKILL


def test_a_run_without_a_network_is_read_back(tmp_path: Path) -> None:
    """The package itself, offline, in a process of its own: what it keeps for `wandb sync` holds every step."""
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    from wandb.proto import wandb_internal_pb2

    code = (
        "import sys; from pathlib import Path; from megatron_vlmr1.telemetry.metrics import MetricsWriter\n"
        "from megatron_vlmr1.telemetry.wandb_sink import WandbSink\n"
        "writer = MetricsWriter(sys.argv[1], WandbSink('mine', Path(sys.argv[1]), {'seed': 3}))\n"
        "for step in range(4): writer.write(step, {'reward/mean': step / 2})\n"
        "writer.close()\n"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    run = tmp_path / "run"
    run.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, run], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    parsed = [wandb_internal_pb2.Record.FromString(data) for data in log_records(file.read_bytes())]
    (begun,) = [record.run for record in parsed if record.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.run_id) == ("mine", (run / "wandb_id").read_text())
    assert {item.key: item.value_json for item in begun.config.update}["seed"] == "3"
    rows = [record.history.item for record in parsed if record.WhichOneof("record_type") == "history"]
    points = [{"/".join(item.nested_key) or item.key: item.value_json for item in row} for row in rows]
    assert [(int(row["_step"]), float(row["reward/mean"])) for row in points] == [(s, s / 2) for s in range(4)]


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format behind W&B's header of 7 bytes: blocks of 32 KiB, records cut into pieces."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""
