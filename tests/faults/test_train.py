"""The main job under faults: killed ranks and reward processes, signals, resume bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs
from tests.jobs import command_line


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def assert_same_course(run: Path, whole: Path, last: int) -> None:
    assert jobs.checkpoint_hashes(run, last) == jobs.checkpoint_hashes(whole, last)
    for step in range(last):
        name = f"samples/step_{step}.jsonl"
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.timeout(200)
def test_a_signal_checkpoints_and_exits_85_and_the_run_goes_on(tmp_path: Path, shards: Path, whole: Path) -> None:
    config = jobs.write_config(tmp_path, shards, train={"save_every": 0})
    job = jobs.start("train", config, "--nproc", 2)
    jobs.wait_for(job, "step 1/4")
    job.send_signal(signal.SIGTERM)
    code, output = jobs.finish(job)
    assert code == 85, output
    code, output = jobs.run_forked(2, "train", config)
    assert code == 0, output
    assert re.search(r"resuming from .*step_[123]", output), output
    assert_same_course(tmp_path / "run", whole, 4)


@pytest.mark.timeout(200)
def test_reward_processes_killed_in_the_middle_of_a_step_cost_nothing(
    tmp_path: Path, shards: Path, whole: Path
) -> None:
    job = jobs.start("train", jobs.write_config(tmp_path, shards), "--nproc", 2)
    jobs.wait_for(job, "step 1/4")
    (service,) = [p for p in descendants(job.pid) if "rewards.server" in command_line(p)]
    assert os.getpgid(service.pid) != os.getpgid(job.pid)
    (worker,) = [p for p in service.children() if "spawn_main" in command_line(p)]
    worker.send_signal(signal.SIGSTOP)  # it takes what the next step asks, and the step waits for it
    time.sleep(5)  # less than rewards.deadline_s, after which the pool would end it
    assert len(read_metrics(tmp_path / "run")) < 4
    worker.send_signal(signal.SIGKILL)
    said = jobs.wait_for(job, "tried once more")
    assert re.search(r"WARNING reward service: .*worker died.*: [1-9]\d* items tried once more, 0 given up", said), said
    service.send_signal(signal.SIGKILL)
    code, output = jobs.finish(job)
    assert code == 0, output
    assert "reward service" in output and "restarting" in output
    assert_same_course(tmp_path / "run", whole, 4)
    rows = read_metrics(tmp_path / "run")
    assert [row["reward/failed_frac"] for _, row in rows] == [0.0] * 4


def of_the_job(log_dir: Path) -> list[psutil.Process]:
    """Every process that has the job's log directory in its environment, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("VLMR1_LOG_DIR") == str(log_dir) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.timeout(200)
def test_one_job_in_a_directory_and_no_orphans_of_a_killed_launcher(tmp_path: Path, shards: Path) -> None:
    config = jobs.write_config(tmp_path, shards, train={"steps": 500})
    job = jobs.start("train", config, "--nproc", 2)
    jobs.wait_for(job, "checkpoint of step 2")

    by_hand = {"RANK": "0", "WORLD_SIZE": "1"}  # as under srun or torchrun, where no launcher asks first
    for code, output in (
        jobs.run("train", config, "--nproc", 2),
        jobs.finish(jobs.start("train", config, "parallel.tensor_model_parallel_size=1", **by_hand)),
    ):
        assert code == 2, output
        (line,) = [line for line in output.splitlines() if "error" in line]
        assert f"{tmp_path / 'run'}: another job is running" in line

    log_dir = tmp_path / "run/logs/attempt_0"
    assert len(of_the_job(log_dir)) >= 4  # two ranks, the reward service, its worker
    job.kill()
    killed = time.monotonic()
    while left := of_the_job(log_dir):
        assert time.monotonic() - killed < 10, [command_line(process) for process in left]
        time.sleep(0.1)
    job.communicate()


@pytest.mark.timeout(200)
def test_ranks_that_somebody_else_started_make_an_attempt_of_their_own(tmp_path: Path, shards: Path) -> None:
    config = jobs.write_config(tmp_path, shards)
    stale = tmp_path / "run/logs/attempt_0/outcome.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"reason": "an earlier attempt", "code": 85, "step": 3}')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ("train", config, "train.steps=1")
    started = [jobs.start(*words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    for job in started:
        code, output = jobs.finish(job)
        assert code == 0, output
    logs = tmp_path / "run/logs"
    assert sorted(path.name for path in logs.iterdir()) == ["attempt_0", "attempt_1"]
    outcome = json.loads((logs / "attempt_1/outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (0, 1)
    assert (logs / "attempt_1/rewards.log").is_file()
