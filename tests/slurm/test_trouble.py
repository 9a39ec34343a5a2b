"""What a cluster does to jobs besides running them, on a real SLURM with a stand-in for the program."""

from __future__ import annotations

import pytest

from megatron_vlmr1.launch import slurm
from tests.slurm.runs import Runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
REQUEUED = 'outcome("saved", 85) if attempt == 0 else outcome("all done", 0)'
ON_GO = '(log_dir / f"ready_{rank}").touch()\nwhile attempt == 0 and not (log_dir / "go").exists(): time.sleep(0.05)\n'


def test_a_controller_that_is_away_when_the_job_has_to_be_requeued(runs: Runs) -> None:
    run = runs.stand_in("away", ON_GO + REQUEUED, chain=2)
    run.until(lambda: len(list(run.run_dir.glob("logs/attempt_0/ready_*"))) == 2, "both ranks")
    runs.machine.stop_controller()
    try:
        (run.attempt(0) / "go").touch()
        run.until(lambda: "again when SLURM answers" in run.log, "its absence to be noticed")
    finally:
        runs.machine.start_controller()
    assert [run.end(link) for link in range(2)] == ["COMPLETED"] * 2, run.log
    assert [run.outcome(number)["code"] for number in range(run.attempts())] == [85, 0]
    assert slurm.job_facts(run.jobs[0])["Restarts"] == "1"
    assert "nothing to do after attempt_1" in run.log, "the chain's next job has waited"


def test_bad_nodes_of_a_job_of_two_parts(runs: Runs) -> None:
    act = (
        'if "serve" in sys.argv: time.sleep(60)\n'
        "if attempt == 0:\n"
        '    rank or (log_dir / "bad_nodes").write_text("n1\\n")\n'
        '    outcome("preflight: n1 is slow", 85)\n'
        'outcome("all done", 0)'
    )
    run = runs.stand_in("parts", act, rewards_nodes=1, cpu_partition="cpu")
    assert run.end() == "COMPLETED", run.log
    assert [who["node"] for who in run.said(1)] == ["n2", "n3"]
