"""The main job under faults: killed ranks and reward processes, signals, resume bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs
from tests.jobs import command_line, ranks


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build_shards(tmp_path_factory.mktemp("data"), "train", 64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = jobs.run("train", jobs.write_config(folder, shards), "--nproc", 2)
    assert code == 0, output
    run = folder / "run"
    assert all(row["train/grad_norm"] > 0 for _, row in read_metrics(run))  # or there would be nothing to resume
    return run


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def assert_same_course(run: Path, whole: Path, last: int) -> None:
    assert jobs.checkpoint_hashes(run, last) == jobs.checkpoint_hashes(whole, last)
    for step in range(last):
        name = f"samples/step_{step}.jsonl"
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.timeout(200)
def test_a_killed_rank_ends_the_job_and_the_next_start_resumes_bit_for_bit(
    tmp_path: Path, shards: Path, whole: Path
) -> None:
    config = jobs.write_config(tmp_path, shards)
    job = jobs.start("train", config, "--nproc", 2)
    jobs.wait_for(job, "step 3/4")
    everyone = descendants(job.pid)
    killed = time.monotonic()
    ranks(job.pid)[1].send_signal(signal.SIGKILL)
    code, output = jobs.finish(job, timeout=10)
    assert time.monotonic() - killed < 10
    assert code not in (0, 85)
    assert "rank 1" in output and "SIGKILL" in output
    gone, alive = psutil.wait_procs(everyone, timeout=5)
    assert not alive, [command_line(p) for p in alive]

    code, output = jobs.run("train", config, "--nproc", 2)
    assert code == 0, output
    assert "resuming from" in output and "step_2" in output
    assert_same_course(tmp_path / "run", whole, 4)


@pytest.mark.timeout(200)
def test_a_signal_checkpoints_and_exits_85_and_the_run_goes_on(tmp_path: Path, shards: Path, whole: Path) -> None:
    config = jobs.write_config(tmp_path, shards, train={"save_every": 0})
    job = jobs.start("train", config, "--nproc", 2)
    jobs.wait_for(job, "step 1/4")
    job.send_signal(signal.SIGTERM)
    code, output = jobs.finish(job)
    assert code == 85, output
    code, output = jobs.run("train", config, "--nproc", 2)
    assert code == 0, output
    assert re.search(r"resuming from .*step_[123]", output), output
    assert_same_course(tmp_path / "run", whole, 4)


@pytest.mark.timeout(200)
def test_a_killed_reward_process_costs_nothing(tmp_path: Path, shards: Path, whole: Path) -> None:
    job = jobs.start("train", jobs.write_config(tmp_path, shards), "--nproc", 2)
    jobs.wait_for(job, "step 1/4")
    service = [p for p in descendants(job.pid) if "rewards.server" in command_line(p)]
    assert service and os.getpgid(service[0].pid) != os.getpgid(job.pid)
    service[0].send_signal(signal.SIGKILL)
    code, output = jobs.finish(job)
    assert code == 0, output
    assert "reward service" in output and "restarting" in output
    assert_same_course(tmp_path / "run", whole, 4)
    rows = read_metrics(tmp_path / "run")
    assert [row["reward/failed_frac"] for _, row in rows] == [0.0] * 4
