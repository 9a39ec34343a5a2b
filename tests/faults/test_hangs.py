"""Ranks that hang, are slow, run out of time or fail at the same step again and again, in the real program."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from megatron_vlmr1.launch.local import new_attempt
from megatron_vlmr1.runtime import heartbeat
from megatron_vlmr1.telemetry.metrics import read_metrics
from megatron_vlmr1.telemetry.timers import PHASES
from tests import jobs
from tests.faults.stuck import break_rollout
from tests.faults.test_train import of_the_job

TIMEOUT_S = 8
LAUNCH = (
    "import sys; from megatron_vlmr1.launch.local import run_ranks; "
    "sys.exit(run_ranks(int(sys.argv[1]), [sys.executable, *sys.argv[3:]], sys.argv[2]))"
)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build_shards(tmp_path_factory.mktemp("few"), "train", 16)


def write_config(tmp_path: Path, few: Path, timeout_s: int = 60, **train: object) -> Path:
    settings = {"save_every": 1, "async_save": False, "sample_every": 0, "prompts_per_step": 2, **train}
    rollout = {"num_generations": 2, "max_new_tokens": 4}
    parallel = {"tensor_model_parallel_size": 2, "timeout_s": timeout_s}
    return jobs.write_config(tmp_path, few, train=settings, rollout=rollout, parallel=parallel)


def start(tmp_path: Path, nproc: int, stuck: str, *words: object) -> tuple[psutil.Popen, Path]:
    """Start the ranks with a fault, "RANK CALL HOW"; return the launcher and the attempt's directory."""
    log_dir = new_attempt(tmp_path / "run")
    script = Path(__file__).with_name("stuck.py")
    command = [sys.executable, "-c", LAUNCH, nproc, log_dir, script, *stuck.split(), "train", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(jobs.ROOT)}
    log = (tmp_path / "launcher.log").open("w")
    return psutil.Popen([str(word) for word in command], stdout=log, stderr=log, env=env, cwd=tmp_path), log_dir


def wait_until_stuck(job: psutil.Popen, log_dir: Path, number: int, stopped: bool) -> psutil.Process:
    """Return the process of rank `number` once it is stopped, or burns time in the function that never returns."""
    while job.poll() is None:
        record = heartbeat.read(log_dir, number)
        if record is not None:
            process = psutil.Process(record.pid)
            if process.status() == psutil.STATUS_STOPPED or (not stopped and record.at.endswith(" spin")):
                return process
        time.sleep(0.05)
    raise AssertionError((log_dir.parents[2] / "launcher.log").read_text())


@pytest.mark.timeout(200)
@pytest.mark.parametrize("how", ["stop", "loop"])
def test_a_rank_that_hangs_is_named_with_its_stacks_within_the_timeout_and_the_job_ends(
    tmp_path: Path, few: Path, how: str
) -> None:
    job, log_dir = start(tmp_path, 2, f"1 1 {how}", write_config(tmp_path, few, TIMEOUT_S, steps=9))
    process = wait_until_stuck(job, log_dir, 1, stopped=how == "stop")
    hung = time.monotonic()
    report = log_dir / "hang/report.json"
    while not report.exists():
        assert time.monotonic() - hung < TIMEOUT_S + 2
        time.sleep(0.05)
    code = job.wait(30)
    said = (tmp_path / "launcher.log").read_text()
    assert code == 70, said
    assert not process.is_running()
    assert not of_the_job(log_dir)

    told = json.loads(report.read_text())
    assert told["blamed"] == [1] and told["mute"] == ([1] if how == "stop" else [])
    outcome = json.loads((log_dir / "outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (70, 1)
    who = f"the job hangs: rank 1 (pid {process.pid} on {os.uname().nodename}) hangs in phase 'rollout' of step 2, for "
    assert outcome["reason"].startswith(who) and who in said
    seconds = float(outcome["reason"].removeprefix(who).split()[0])
    assert TIMEOUT_S - 2 <= seconds <= TIMEOUT_S + 2
    assert ("process state T (stopped)" in outcome["reason"]) == (how == "stop")
    stacks = (log_dir / "hang/rank_1.txt").read_text()
    if how == "loop":
        assert "spin" in stacks and "faults/stuck.py" in outcome["reason"]
    elif shutil.which("py-spy", path=str(Path(sys.executable).parent)):
        assert "send (stuck.py:" in stacks and "train (megatron_vlmr1/train/grpo.py:" in stacks
    assert "all_reduce" in (log_dir / "hang/rank_0.txt").read_text()  # who waits says where


@pytest.mark.timeout(200)
def test_a_slow_rank_is_named_with_its_phase(tmp_path: Path, few: Path) -> None:
    """Both ranks take as long, since one waits for the other: what counts is who of them waits."""
    config = write_config(tmp_path, few, steps=5, save_every=0)
    code, output = jobs.run_forked(2, "train", config, before=partial(break_rollout, "1", 1, "slow"))
    assert code == 0, output
    for _, row in read_metrics(tmp_path / "run")[1:]:  # the first step warms up
        assert (row["straggler/rank"], PHASES[int(row["straggler/phase"])]) == (1, "rollout")
        assert 1.0 < row["straggler/excess_s"] < row["perf/step_s"]
        assert row["straggler/ratio"] > 1.5
    assert "WARNING rank 1 is slow in phase 'rollout': " in output


@pytest.mark.timeout(200)
def test_the_time_limit_saves_and_exits_85(tmp_path: Path, few: Path) -> None:
    begun = time.monotonic()
    config = write_config(tmp_path, few, steps=100_000, save_every=0, exit_before="0:00:12")
    code, output = jobs.run_forked(2, "train", config)
    assert code == 85, output
    outcome = json.loads((tmp_path / "run/logs/attempt_0/outcome.json").read_text())
    step = outcome["step"]
    assert outcome["code"] == 85 and step >= 1
    assert outcome["reason"] == f"checkpointed at step {step} on its time limit, train.exit_before=12 s"
    assert (tmp_path / f"run/checkpoints/step_{step}/manifest.json").is_file()
    if time.monotonic() - begun < 27:  # the start alone did not take up the limit
        assert len(read_metrics(tmp_path / "run")) == step


@pytest.mark.timeout(250)
def test_three_crashes_of_the_same_step_stop_the_run_until_it_is_told_to_try_again(tmp_path: Path, few: Path) -> None:
    config = write_config(tmp_path, few, steps=2)
    one = "parallel.tensor_model_parallel_size=1"
    job, first = start(tmp_path, 1, "0 1 kill", config, one)
    assert job.wait(100) == 137
    (record,) = heartbeat.read_all(first)
    assert (record.step, record.resumed, record.left) == (1, 0, False)
    for number in (1, 2):  # as the second and third start would leave it: killed at the same step
        heartbeat.write(first.with_name(f"attempt_{number}"), heartbeat.Heartbeat(0, "host", 1, step=1, resumed=1))

    code, output = jobs.run_forked(1, "train", config, one)
    assert code == 17, output
    (line,) = [line for line in output.splitlines() if "stopped" in line]
    assert line.startswith("vlmr1: stopped: step 2 failed 3 times in a row (attempt_0: rank 0 was killed in phase ")
    assert "attempt_2" in line and "start once with --retry" in line
    outcome = json.loads((tmp_path / "run/logs/attempt_3/outcome.json").read_text())
    assert outcome["code"] == 17 and outcome["reason"].startswith("step 2 failed 3 times in a row")
    assert "resuming" not in output

    code, output = jobs.run("train", config, one, "--retry")
    assert code == 0, output
    assert "resuming from" in output and [step for step, _ in read_metrics(tmp_path / "run")] == [0, 1]
