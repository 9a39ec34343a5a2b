"""The main job with data workers and a mixture: the course of a run without workers, and none of them outlives it."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from tests import jobs
from tests.jobs import command_line


def workers_of(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children(recursive=True) if "megatron_vlmr1.train.loader" in command_line(p)]


@pytest.mark.timeout(200)
def test_data_workers_change_nothing_even_when_they_are_killed(tmp_path: Path, shards: Path, whole: Path) -> None:
    config = jobs.write_config(tmp_path, shards, data={"train": str(shards), "workers": 1})
    job = jobs.start("train", config, "--nproc", 2)
    jobs.wait_for(job, "step 1/4")
    found = workers_of(job.pid)
    assert len(found) == 2  # one of each rank
    for worker in found:
        worker.kill()
    code, output = jobs.finish(job)
    assert code == 0, output
    assert "starting another" in output  # rank 0 says so; the others speak into their own logs
    assert jobs.checkpoint_hashes(tmp_path / "run", 4) == jobs.checkpoint_hashes(whole, 4)
    assert not any(psutil.pid_exists(worker.pid) for worker in found)


@pytest.mark.timeout(200)
def test_a_mixture_is_trained_on_and_each_loss_is_in_the_ledger(tmp_path: Path, shards: Path) -> None:
    other = jobs.build_shards(tmp_path, "heldout", 8)
    for tar in other.glob("*.tar"):
        tar.unlink()
    mixture = [{"path": str(shards), "weight": 3}, {"path": str(other), "weight": 1}]
    data = {"train": mixture, "lanes": 4, "workers": 1}
    config = jobs.write_config(tmp_path, shards, data=data)
    code, output = jobs.run_forked(2, "train", config)  # 4 steps of 4 prompts: a whole block
    assert code == 0, output
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger" / "rank_0.jsonl").read_text().splitlines()]
    assert len(ledger) == 4  # the quarter that the absent set was to give
    assert {row["shard"].rpartition("/")[0] for row in ledger} == {str(other)}
    assert {row["reason"] for row in ledger} == {"the shard is missing"}
    drawn = [
        json.loads(line)
        for step in range(4)
        for line in (tmp_path / "run" / "samples" / f"step_{step}.jsonl").read_text().splitlines()
    ]
    positions = {row["position"] for row in drawn} if drawn and "position" in drawn[0] else set()
    assert not positions & {row["position"] for row in ledger}
    code, output = jobs.run_forked(2, "train", config, "data.train=" + str(shards))
    assert code == 2 and "was started with data.train=" in output
