"""The tiny model on two nodes of a real SLURM: undisturbed, preempted, out of time, with a rank and a node killed."""

from __future__ import annotations

import json
import os
import signal

import pytest

from megatron_vlmr1.launch import slurm
from tests.slurm.runs import STEPS, Runs, pending, scontrol

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def test_a_run_on_two_nodes_to_its_end(runs: Runs) -> None:
    run = runs.whole
    assert run.outcome(0) == {"reason": f"{STEPS} of {STEPS} steps done", "code": 0, "step": STEPS}
    assert os.readlink(run.run_dir / "logs/latest") == "attempt_0" and run.attempts() == 1
    assert sorted(path.name for path in run.attempt(0).glob("rank_*.log")) == ["rank_0.log", "rank_1.log"]
    assert f"step {STEPS}/{STEPS} " in (run.attempt(0) / "rank_0.log").read_text()
    assert f"vlmr1: job {run.jobs[0]} on n[1-2]" in run.log
    facts = json.loads((run.run_dir / "facts.json").read_text())
    assert len(set(facts["rank_pids"])) == 2
    submitted = json.loads((run.run_dir / "snapshots/0/facts.json").read_text())
    assert (submitted["nodes"], submitted["ranks"]) == (2, 2)


def test_preempted_it_saves_is_requeued_and_ends_as_if_nothing_had_been(runs: Runs) -> None:
    run = runs.submit("preempted")
    with run.stopped() as pids:  # or the run might be over before SLURM passes the signal on
        run.preempt(pids)
    assert run.end() == "COMPLETED", run.log
    assert run.outcome(0)["code"] == 85 and "SIGUSR1" in run.outcome(0)["reason"]
    assert 1 <= run.outcome(0)["step"] < STEPS
    assert run.outcome(1)["code"] == 0 and run.attempts() == 2
    assert slurm.job_facts(run.jobs[0])["Restarts"] == "1"
    runs.same_as_whole(run)


def test_before_its_time_limit_the_same(runs: Runs) -> None:
    run = runs.submit("limited", signal_s=540, time="60")  # 9 minutes before the end, which comes nearer below
    with run.stopped() as pids:  # or the run would be over before SLURM looks, every half minute
        scontrol("update", f"JobId={run.jobs[0]}", "TimeLimit=9")
        run.until(lambda: any(pending(pid, signal.SIGUSR1) for pid in pids), "SLURM's signal")
    run.until(lambda: run.state() == "PENDING", "requeueing")
    scontrol("update", f"JobId={run.jobs[0]}", "TimeLimit=60")
    assert run.end() == "COMPLETED", run.log
    assert run.outcome(0)["code"] == 85 and "on SIGUSR1" in run.outcome(0)["reason"], "not the ranks' own limit"
    assert run.attempts() == 2 and run.outcome(1)["code"] == 0
    runs.same_as_whole(run)


def test_a_killed_rank_is_named_within_ten_seconds_and_the_chain_goes_on(runs: Runs) -> None:
    run = runs.submit("killed", chain=3)
    run.until(lambda: run.steps() >= 4, "a checkpoint")
    os.kill(run.pids(0)[1], signal.SIGKILL)
    assert run.until(lambda: run.state(0) == "FAILED", "the job's failure", 20) < 10
    assert "vlmr1: rank 1 on n2 was killed (Killed); logs in " in run.log
    assert run.outcome(0) == {"reason": "rank 1 on n2 was killed (Killed)", "code": 70, "step": None}
    assert run.end(1) == "COMPLETED" and run.outcome(1)["code"] == 0, run.log
    assert run.end(2) == "COMPLETED" and run.attempts() == 2
    assert "vlmr1: nothing to do after attempt_1" in run.log
    runs.same_as_whole(run)


def test_without_a_node_it_is_requeued_and_ends(runs: Runs) -> None:
    run = runs.submit("orphaned")
    run.until(lambda: run.steps() >= 4, "a checkpoint")
    try:
        runs.machine.kill_node("n2")
        assert run.end() == "COMPLETED", run.log
    finally:
        runs.machine.start_node("n2")
        runs.machine.wait_idle(["n1", "n2", "n3"])
    assert run.attempts() == 2 and run.outcome(1)["code"] == 0
    assert f"vlmr1: job {run.jobs[0]} on n[1,3]" in run.log
    assert slurm.job_facts(run.jobs[0])["Restarts"] == "1"
    runs.same_as_whole(run)
