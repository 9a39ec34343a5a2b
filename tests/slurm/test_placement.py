"""Where tasks come to be and what follows their ends, on a real SLURM; most with a stand-in for the program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_vlmr1.cli.main import main
from megatron_vlmr1.launch import slurm
from tests import jobs
from tests.slurm.one_machine import GPUS
from tests.slurm.runs import STEPS, Runs, Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
DONE = 'outcome("all done", 0)'
SIXTEEN = {"train": {"steps": STEPS, "prompts_per_step": 16}}


def test_sixteen_ranks_on_two_nodes_have_a_gpu_each(runs: Runs) -> None:
    run = runs.stand_in("gpus", DONE, SIXTEEN, gpus_per_node=GPUS)
    assert run.end() == "COMPLETED", run.log
    said = run.said()
    assert [(who["rank"], who["world"]) for who in said] == [(rank, 16) for rank in range(16)]
    assert [who["node"] for who in said] == ["n1"] * 8 + ["n2"] * 8
    assert [who["gpu"] for who in said] == [str(number) for number in range(8)] * 2
    assert {who["visible"] for who in said} == {8}, "NCCL reaches its neighbours on the node"


def test_one_rank_is_a_job_too(runs: Runs) -> None:
    run = runs.stand_in("one", DONE, nodes=1)
    assert run.end() == "COMPLETED", run.log
    left = [p for p in psutil.process_iter() if f"job{int(run.jobs[0]):05}/slurm_script" in jobs.command_line(p)]
    assert left == [], "the script leaves nothing running"
    assert [(who["rank"], who["world"], who["node"]) for who in run.said()] == [(0, 1, "n1")]


def test_what_slurm_refuses_is_told_and_leaves_nothing(runs: Runs) -> None:
    with pytest.raises(ValueError, match="sbatch: .*Requested node configuration is not available"):
        runs.stand_in("many", DONE, {"train": {"prompts_per_step": 18}, "data": {"lanes": 18}}, gpus_per_node=9)
    assert list((runs.root / "many/snapshots").iterdir()) == []


def test_the_job_runs_the_snapshot_from_the_directory_of_its_submission(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tmp_path / "a b'c\"d$e`f#g%j;h&ä"
    strange.mkdir()
    monkeypatch.chdir(strange)
    extra = "two\nlines 'of' \"$HOME\" `x`"
    monkeypatch.setattr(runs, "root", strange)
    run = runs.stand_in("r u'n%j", DONE, environment={"EXTRA": extra})
    assert run.end() == "COMPLETED", run.log
    first, second = run.said()
    assert run.run_dir == strange / "r u'n%j" and "all done" in run.log
    assert first["package"] == str(run.run_dir / "snapshots/0/code/megatron_vlmr1/__init__.py")
    assert first["cwd"] == second["cwd"] == str(strange) and first["extra"] == second["extra"] == extra
    assert first["words"] == ["-m", "megatron_vlmr1.cli", "train", str(run.run_dir / "snapshots/0/config.yaml")]


def test_bad_nodes_are_left_out_when_the_job_is_requeued_and_ever_after(runs: Runs) -> None:
    act = (
        "if attempt == 0:\n"
        '    rank or (log_dir / "bad_nodes").write_text("n1\\n")\n'
        '    outcome("preflight: n1 is slow", 85)\n'
        f"{DONE}"
    )
    run = runs.stand_in("bad", act, exclude=["c1"])
    assert run.end() == "COMPLETED", run.log
    assert [who["node"] for who in run.said(0)] == ["n1", "n2"]
    assert [who["node"] for who in run.said(1)] == ["n2", "n3"]
    assert "vlmr1: without n1 from now on" in run.log
    assert (
        set(slurm.job_facts(run.jobs[0])["ExcNodeList"].split(",")) == {"n1", "c1"}
        or slurm.job_facts(run.jobs[0])["ExcNodeList"] == "c1,n1"
    )
    assert (run.run_dir / "bad_nodes").read_text() == "n1\n"
    again = runs.submit("bad", venv=str(runs.root / "bad.venv"))
    assert again.end() == "COMPLETED", again.log
    assert [who["node"] for who in again.said(2)] == ["n2", "n3"]


def test_a_chain_goes_on_after_a_crash_and_ends_with_what_stopped_itself(runs: Runs) -> None:
    act = 'sys.exit(3) if attempt == 0 else outcome("no more \\"code\\":0 numbers", 17)'
    run = runs.stand_in("chain", act, chain=4)
    assert [run.end(link) for link in range(4)] == ["FAILED"] * 4
    codes = [slurm.job_facts(job)["ExitCode"] for job in run.jobs]
    assert codes == ["70:0", "17:0", "17:0", "17:0"]
    assert run.attempts() == 2
    assert re.search(r"vlmr1: rank \d(-\d)? on n(1|2|\[1-2\]) left with exit code 3; logs in", run.log)
    assert run.log.count("vlmr1: nothing to do after attempt_1: ") == 2
    assert run.log.count(r"no more \"code\":0 numbers") == 3
    again = runs.submit("chain", venv=str(runs.root / "chain.venv"))
    again.end()
    assert run.attempts() == 3, "a new submission starts whatever came before"


def test_ranks_that_would_wait_for_a_dead_one_are_killed_soon(runs: Runs) -> None:
    act = (
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"  # as ranks do, which save when they are asked to stop
        "while len(list(log_dir.glob('here_*'))) < 2: time.sleep(0.05)\n"
        '(log_dir / f"ready_{rank}").touch()\n'
        "rank == 1 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "while True: time.sleep(1)"
    )
    run = runs.stand_in("waiting", act)
    run.until((run.attempt(0) / "ready_1").exists, "both ranks")
    assert run.until(lambda: run.state() == "FAILED", "the job's failure", 25) < 10
    assert run.outcome(0)["reason"] == "rank 1 on n2 was killed (Killed)"


def test_where_a_node_does_not_answer_the_job_is_not_failed_but_left_to_slurm(runs: Runs) -> None:
    act = (
        "if attempt == 0:\n"
        '    (log_dir / f"ready_{rank}").touch()\n'
        '    while not (log_dir / "go").exists(): time.sleep(0.05)\n'
        "    sys.exit(70)\n"  # as ranks do that have lost one of them
        f"{DONE}"
    )
    run = runs.stand_in("lost", act)
    run.until(lambda: len(list(run.run_dir.glob("logs/attempt_0/ready_*"))) == 2, "both ranks")
    try:
        runs.machine.kill_slurmd("n2")
        (run.attempt(0) / "go").touch()
        assert run.end() == "COMPLETED", run.log
    finally:
        runs.machine.start_node("n2")
        runs.machine.wait_idle(["n1", "n2", "n3"])
    assert "vlmr1: no answer from n2: SLURM requeues this job" in run.log
    assert [who["node"] for who in run.said(1)] == ["n1", "n3"] and not (run.attempt(0) / "outcome.json").exists()


def test_a_cancelled_job_stays_cancelled_although_it_saved(runs: Runs) -> None:
    act = (
        'signal.signal(signal.SIGTERM, lambda *_: outcome("saved", 85))\n'
        '(log_dir / f"ready_{rank}").touch()\n'
        "time.sleep(60)"
    )
    run = runs.stand_in("cancelled", act)
    run.until(lambda: len(list(run.run_dir.glob("logs/attempt_0/ready_*"))) == 2, "both ranks")
    slurm.cancel(run.jobs[0])
    assert run.end() == "CANCELLED"
    run.until(lambda: "exit code 85" in run.log, "srun's end")
    runs.machine.wait_idle(["n1", "n2"])
    assert run.state() == "CANCELLED" and run.outcome(0)["code"] == 85 and run.attempts() == 1


def test_rewards_on_a_cpu_node_and_a_requeue(runs: Runs) -> None:
    run = runs.submit("apart", rewards_nodes=1, cpu_partition="cpu")
    with run.stopped() as pids:
        services = [p for p in runs.machine.processes() if "megatron_vlmr1.rewards.server" in jobs.command_line(p)]
        assert {p.environ()["SLURMD_NODENAME"] for p in services} == {"c1"}
        show = ["scontrol", "show", "job", "-o", run.jobs[0]]
        described = subprocess.run(show, capture_output=True, text=True).stdout
        places = re.findall(r" Partition=(\w+) .* NodeList=(\S+) ", described)
        assert places == [("ci", "n[1-2]"), ("cpu", "c1")]
        run.preempt(pids)
    assert run.end() == "COMPLETED", run.log
    assert [run.outcome(number)["code"] for number in range(run.attempts())] == [85, 0]
    assert "serving on tcp://0.0.0.0:" in (run.attempt(1) / "rewards.log").read_text()
    assert not any(path.name == "rewards.log" and "ipc://" in path.read_text() for path in run.attempt(1).iterdir())
    scored = json.loads((run.run_dir / "facts.json").read_text())["scored"]
    assert scored == 16 * (STEPS - run.outcome(0)["step"])
    runs.same_as_whole(run)
    runs.machine.wait_idle(["n1", "n2", "c1"])
    assert "replaced" not in (run.attempt(0) / "rewards.log").read_text().partition("REQUEUE")[0], "USR1 is for ranks"
    assert not [p for p in psutil.process_iter() if str(run.run_dir) in jobs.command_line(p)], "the service is gone"


def test_the_verb_submits(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    config = jobs.write_config(runs.root, runs.shards, "verb", parallel={"tensor_model_parallel_size": 1})
    file = runs.root / "verb.cluster.yaml"
    file.write_text(f"partition: ci\ncpu_bind: none\nvenv: {Path(sys.executable).parents[1]}\n")
    words = ["submit", str(config), "--nodes", "2", "--cluster", str(file), "--chain", "2", "--json", "train.steps=1"]
    assert main(words) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["run_dir"] == str(runs.root / "verb") and len(told["jobs"]) == 2
    for job in reversed(told["jobs"]):
        slurm.cancel(job)
    run = Submitted(runs.root / "verb", told["jobs"])
    assert [run.end(link) for link in range(2)] == ["CANCELLED"] * 2
    assert slurm.job_state("999999") is None
    os.stat(runs.root / "verb/snapshots/0/job.sbatch")
