"""`vlmr1 submit` with stand-ins for SLURM's commands: what is submitted, frozen, taken back, and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.launch import slurm, snapshot
from tests import jobs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build_shards(tmp_path_factory.mktemp("data"), "train", 8)


def fake(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_submission_freezes_code_and_config(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = tmp_path / "calls"
    fake(tmp_path / "bin", "sbatch", f'echo "$@" >>{calls}; n=$(wc -l <{calls}); echo "$((40 + n));cluster"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    path = jobs.write_config(tmp_path, shards, parallel={"tensor_model_parallel_size": 1})
    task = tmp_path / "my_task.py"
    task.write_text((ROOT / "megatron_vlmr1/rewards/tasks/rec.py").read_text())
    words = ["submit", str(path), "--nodes", "2", "--cluster", "cpu", "--chain", "3", "--json", "train.steps=7"]
    assert main([*words, "--rewards-nodes", "1", f"task={task}"]) == 0
    frozen = tmp_path / "run/snapshots/0"
    assert json.loads(capsys.readouterr().out) == {"jobs": ["41", "42", "43"], "run_dir": str(tmp_path / "run")}
    sent = [line.split() for line in calls.read_text().splitlines()]
    assert sent == [
        ["--parsable", f"{frozen}/job.sbatch"],
        ["--parsable", "--dependency=afterany:41", f"{frozen}/job.sbatch"],
        ["--parsable", "--dependency=afterany:42", f"{frozen}/job.sbatch"],
    ]
    cfg = config.load(frozen / "config.yaml")
    assert cfg.train.steps == 7 and cfg.rewards.workers == 8
    assert cfg.task == str(task) and Path(f"{frozen}/files{task}").read_bytes() == task.read_bytes()
    assert " VLMR1_FILES=$SNAPSHOT/files " in (frozen / "job.sbatch").read_text()
    assert cfg.rewards.keys == str(tmp_path / "run/rewards-keys") and (tmp_path / "run/rewards-keys/clients").is_dir()
    facts = json.loads((frozen / "facts.json").read_text())
    assert facts["chain"] == 3 and facts["cluster"]["tasks_per_node"] == 1 and facts["versions"]["torch"]
    (frozen / "code/megatron_vlmr1/__init__.py").write_text("__version__ = '9.9.9'\n")
    env = {**os.environ, "PYTHONPATH": str(frozen / "code"), "PYTHONSAFEPATH": "1"}
    version = subprocess.run(
        [sys.executable, "-m", "megatron_vlmr1.cli", "--version"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert version.stdout == "vlmr1 9.9.9\n", "not the checkout that it runs in"
    assert not any(path.is_symlink() for path in (frozen / "code").rglob("*"))
    assert snapshot.next_path(tmp_path / "run") == tmp_path / "run/snapshots/1"


def test_what_sbatch_refuses_leaves_no_snapshot_and_no_job(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    fake(tmp_path / "bin", "sbatch", '[[ $* == *afterany* ]] && echo "error: too many" >&2 && exit 1; echo 5')
    fake(tmp_path / "bin", "scancel", f'echo "$@" >>{tmp_path}/cancelled')
    path = jobs.write_config(tmp_path, shards, parallel={"tensor_model_parallel_size": 1})
    assert main(["submit", str(path), "--nodes", "1", "--cluster", "cpu", "--chain", "2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "vlmr1: error: sbatch: error: too many"
    assert (tmp_path / "cancelled").read_text() == "5\n" and list((tmp_path / "run/snapshots").iterdir()) == []


def test_interrupted_it_takes_back_what_is_submitted(
    tmp_path: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, former))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    fake(tmp_path / "bin", "sbatch", "[[ $* == *afterany* ]] && kill -INT $PPID && sleep 1; echo 5")
    fake(tmp_path / "bin", "scancel", f'echo "$@" >>{tmp_path}/cancelled; echo "no contact" >&2; exit 1')
    path = jobs.write_config(tmp_path, shards, parallel={"tensor_model_parallel_size": 1})
    assert main(["submit", str(path), "--nodes", "1", "--cluster", "cpu", "--chain", "2"]) == 130
    assert (tmp_path / "cancelled").read_text() == "5\n" and list((tmp_path / "run/snapshots").iterdir()) == []
    assert "job 5 is still in the queue, where it will fail: scancel: no contact" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["snapshots", "logs", ""])
def test_a_run_directory_that_cannot_be_written(
    name: str, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path / "bin", "sbatch", "echo 5")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    path = jobs.write_config(tmp_path, shards, parallel={"tensor_model_parallel_size": 1})
    file = tmp_path / "run" / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert main(["submit", str(path), "--nodes", "1", "--cluster", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vlmr1: error: {file}")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str, **rest: Any) -> None:
        raise shutil.Error([(source, target, "[Errno 28] No space left on device: 'a'"), (source, target, "more")])

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match=f"^{tmp_path}/0: .Errno 28. No space left on device: 'a'$"):
        snapshot.write(tmp_path / "0", "", "", {})


def test_a_full_disk_and_a_file_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "copytree", lambda source, target, **rest: target.mkdir(parents=True))
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/task.py'$"):
        snapshot.write(tmp_path / "0", "", "", {}, [str(tmp_path / "task.py")])
    monkeypatch.setattr(snapshot, "_freeze", lambda file, folder: Path("/dev/full").write_text(file))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/0'$"):
        snapshot.write(tmp_path / "0", "", "", {}, ["task.py"])
    assert os.listdir(tmp_path) == []


def test_a_number_that_another_submission_took(tmp_path: Path) -> None:
    snapshot.write(tmp_path / "0", "first", "", {})
    with pytest.raises(OSError, match=f"^{tmp_path}/0: another submission took this number just now: submit again$"):
        snapshot.write(tmp_path / "0", "second", "", {})
    assert (tmp_path / "0/config.yaml").read_text() == "first" and os.listdir(tmp_path) == ["0"]


def test_slurm_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (
        slurm.check_installed,
        lambda: slurm.sbatch(tmp_path),
        lambda: slurm.job_state("1"),
        lambda: slurm.cancel("1"),
    ):
        with pytest.raises(ValueError, match="not found; this must run where SLURM's commands are"):
            call()


def test_what_slurm_says_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    line = "JobId=7 JobName=x State=no HetJobIdSet=7-8 JobState=RUNNING Reason=None NodeList=n[1-2] BatchHost=n1"
    fake(tmp_path, "scontrol", f'echo "{line}"; echo "JobId=8 JobState=PENDING"')
    assert slurm.job_state("7") == "RUNNING" and slurm.job_facts("7")["NodeList"] == "n[1-2]"
    fake(tmp_path, "scontrol", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert slurm.job_state("7") is None and slurm.job_facts("7") == {}
    fake(tmp_path, "scontrol", "echo Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(ValueError, match="^scontrol: Unable to contact slurm controller$"):
        slurm.job_state("7")


def test_local_sh(tmp_path: Path) -> None:
    fake(tmp_path, "nvidia-smi", "echo 'GPU 0: x'; echo 'GPU 1: x'")
    fake(tmp_path, "python3", 'printf "%s|" "$@"')
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VIRTUAL_ENV": "/x"}
    run = ["bash", str(ROOT / "launch/local.sh"), "c.yaml", "a.b=c d"]
    said = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout
    assert said == "-m|megatron_vlmr1.cli|train|c.yaml|a.b=c d|--nproc|2|"
    said = subprocess.run([*run, "--nproc", "1"], env=env, capture_output=True, text=True, check=True).stdout
    assert said == "-m|megatron_vlmr1.cli|train|c.yaml|a.b=c d|--nproc|1|"
    fake(tmp_path, "nvidia-smi", "exit 9")
    said = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout
    assert said == "-m|megatron_vlmr1.cli|train|c.yaml|a.b=c d|"
