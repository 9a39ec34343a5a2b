"""`vlmr1 doctor`: a line for each thing, what to do, and the exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from megatron_vlmr1.cli import doctor
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.launch import doctor_gpus, doctor_host, doctor_packages, doctor_slurm, versions
from megatron_vlmr1.launch.doctor import job_lines
from megatron_vlmr1.launch.doctor_line import Line, all_well
from megatron_vlmr1.launch.preflight import Examination
from megatron_vlmr1.launch.preflight_verdict import Verdict
from megatron_vlmr1.runtime import distributed
from megatron_vlmr1.telemetry import nvml
from tests.fake_nvml import FakeNvml


def by_name(lines: Any) -> dict[str, Line]:
    return {line.name: line for line in lines}


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--json", "--run-dir", str(tmp_path / "new")]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = by_name(Line(**line) for line in found["lines"])
    assert found["ok"] and found["job"] is None
    assert {"Python", "packages", "import torch", "import megatron.core", "memory", "SLURM", "GPUs"} <= lines.keys()
    assert lines["run directory"].found.startswith(f"{tmp_path}: ") and not (tmp_path / "new").exists()
    assert all(line.do for line in lines.values() if line.state != "ok")
    assert all(not line.do for line in lines.values() if line.state == "ok")
    assert main(["doctor", "--run-dir", str(tmp_path)]) == 0
    assert "what to do" in capsys.readouterr().out


def test_a_config_that_names_what_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        raw = {"model": {"path": "asset:tiny_vlm"}, "data": {"train": "/nowhere"}, "run_dir": "/proc/run"}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**raw, "telemetry": {"prometheus_port": port}}))
        assert main(["doctor", str(tmp_path / "c.yaml"), "--json"]) == 2
    lines = by_name(Line(**line) for line in json.loads(capsys.readouterr().out)["lines"])
    assert lines["model and layout"].state == "ok"
    assert lines["data"].state == "bad" and "/nowhere" in lines["data"].found
    assert lines["run directory"].state == "bad" and lines[f"port {port}"].state == "missing"
    assert main(["doctor", str(tmp_path / "absent.yaml")]) == 2
    assert "no such config file" in capsys.readouterr().err


def test_packages_out_of_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"numpy": "1.0", "torch": "2.13.0", "pebble": ""}
    monkeypatch.setattr(doctor_packages, "installed", lambda name: has.get(name, "9.9"))
    wanted = ["numpy>=1.26", "torch>=2.6", "pebble>=5.0", "nothing>=1; python_version < '3'"]
    lines = by_name(
        doctor_packages._requirements([*wanted, "wandb>=10; extra == 'wandb'", "py-spy<10; extra == 'debug'"])
    )
    assert lines["numpy"] == Line("numpy", "bad", "1.0, not >=1.26", "pip install 'numpy>=1.26'")
    assert lines["pebble"] == Line("pebble", "bad", "is not installed", "pip install 'pebble>=5.0'")
    assert lines["packages"].found.startswith("1 of 3 ")
    assert lines["extra wandb"].state == "missing" and "megatron-vlmr1[wandb]" in lines["extra wandb"].do
    assert lines["extra debug"] == Line("extra debug", "ok", "py-spy 9.9")
    assert doctor_packages._python(">=3.99").state == "bad" and doctor_packages._python(">=3.11").state == "ok"


def test_an_installation_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    def broken() -> str:
        raise ImportError("libcudart.so.12:\ncannot open")

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setitem(doctor_packages._IMPORTS, "torch", broken)
    lines = list(doctor_packages.lines())
    assert [line.state for line in lines] == ["bad", "bad"]
    assert lines[1].found == "ImportError: libcudart.so.12: cannot open"


def test_torch_that_cannot_be_imported_is_a_line_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libtorch.so: no such file')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-m", "megatron_vlmr1.cli", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "", done.stderr
    bad = [line for line in json.loads(done.stdout)["lines"] if line["state"] == "bad"]
    assert [line["found"] for line in bad] == ["ImportError: libtorch.so: no such file"]


@pytest.mark.parametrize(
    ("has_cuda", "engine", "apex", "which"),
    [
        (True, True, True, "Transformer Engine's, fused"),
        (True, False, True, "apex's, fused"),
        (True, False, False, "torch's"),
        (False, True, False, "torch's"),
    ],
)
def test_which_adam_megatron_core_takes(monkeypatch, has_cuda: bool, engine: bool, apex: bool, which: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if engine else None)
    assert doctor_packages._adam(has_cuda, apex) == which


def test_transformer_engine_is_looked_for_but_never_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no CUDA')")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = doctor_packages._transformer_engine(has_cuda=False)
    assert line.state == "bad" and "pip uninstall" in line.do
    assert doctor_packages._transformer_engine(has_cuda=True).state == "ok"
    assert "megatron.core" not in [line.name.removeprefix("import ") for line in doctor_packages._imports()]
    assert "transformer_engine" not in sys.modules
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor_packages._transformer_engine(has_cuda=True).do.startswith("pip install --no-build-isolation")


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "library", lambda: FakeNvml({}, {"uncorrected": 4, "reasons": 0x40}, None))
    well, sick, lost = doctor_gpus.lines()
    assert well == Line("GPU 0", "ok", "H100, 75.2 of 85.9 GB free, 1900 of 1980 MHz")
    assert sick.found == "is slowed down (hardware thermal slowdown), has 4 uncorrected memory errors"
    assert lost.found == "does not answer: GPU is lost" and {sick.state, lost.state} == {"bad"}
    monkeypatch.setattr(nvml, "library", lambda: None)
    (line,) = doctor_gpus.lines()
    assert line.state == "missing"


def test_cuda_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "driver_version", lambda: "")
    assert doctor_packages._cuda(False, "").found == "torch is built without"
    assert doctor_packages._cuda(False, "12.8").found == "torch is built for 12.8; no driver"
    monkeypatch.setattr(nvml, "driver_version", lambda: "550.54")
    assert doctor_packages._cuda(False, "").do == "install a torch with CUDA"
    assert doctor_packages._cuda(True, "12.8").state == "ok"


def test_limits_and_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    soft = {resource.RLIMIT_NOFILE: 100, resource.RLIMIT_MEMLOCK: 1 << 20}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft[kind], 1 << 20))
    assert doctor_host._limit("files", resource.RLIMIT_NOFILE, 1024).do.startswith("raise it to 1024 ")
    assert doctor_host._limit("locked", resource.RLIMIT_MEMLOCK, None).state == "missing"
    assert doctor_host._limit("locked", resource.RLIMIT_MEMLOCK, 0).state == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"total": 1 << 26, "free": 1 << 20}))
    assert doctor_host._shm(tmp_path).state == "missing"
    assert doctor_host.disk_line("x", tmp_path).state == "bad"
    monkeypatch.setattr(doctor_host, "_CGROUPS", (tmp_path / "absent", tmp_path / "max"))
    for text, limit in (("max\n", None), (f"{1 << 27}\n", 1 << 27), (f"{1 << 62}", None)):
        (tmp_path / "max").write_text(text)
        assert doctor_host.cgroup_limit() == limit
    (tmp_path / "max").write_text(str(1 << 27))
    assert doctor_host._memory().state == "bad"


@pytest.mark.parametrize("text", ["abc", "99999", "-1"])
def test_a_master_port_that_is_none(text: str) -> None:
    line = doctor_host._master_port(text)
    assert (line.state, line.found) == ("bad", f"{text!r} is no port")


def test_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (line,) = doctor_slurm.lines()
    assert line.state == "missing" and line.found.startswith("no sbatch, srun")
    for name in doctor_slurm._COMMANDS:
        (tmp_path / name).write_text("#!/bin/sh\necho Slurmctld at n1 is $ANSWER\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("ANSWER", "DOWN")
    assert next(doctor_slurm.lines()).state == "missing"
    monkeypatch.setenv("ANSWER", "UP")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert [line.found for line in doctor_slurm.lines()] == ["Slurmctld at n1 is UP", "7 on n[1-2]"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(subprocess.TimeoutExpired("x", 1)))
    assert next(doctor_slurm.lines()).state == "missing"


def test_a_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    doctor._print_table([Line("a", "ok", "1"), Line("b", "bad", "2", "mend")])
    assert capsys.readouterr().out == "a: ok: 1\nb: bad: 2 -> mend\n"


def test_ranks_that_do_not_come_are_a_line_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(timeout_s: int) -> None:
        raise dist.DistStoreError("1/2 clients joined.\nC++ stack")

    monkeypatch.setattr(distributed, "start", start)
    with pytest.raises(
        ValueError, match=r"^not all ranks met in 120 s, see what the others say: 1/2 clients joined\.$"
    ):
        doctor._examined(None, tmp_path)


def test_a_job_in_lines() -> None:
    judged = Verdict("torch is 1 on n0 and 2 on n1", {"n1": ["sick", "slow"]}, ["drivers differ"])
    lines = job_lines(Examination("full", 1.0, (), (), judged))
    assert [line.state for line in lines] == ["ok", "bad", "bad", "missing"] and not all_well(lines)
    assert lines[2] == Line("node n1", "bad", "sick, slow", "leave it out: --exclude=n1")
    assert all_well([Line("a", "ok", ""), Line("b", "missing", "", "x")])


def test_versions_without_a_package() -> None:
    assert versions.installed("no-such-distribution") == ""
