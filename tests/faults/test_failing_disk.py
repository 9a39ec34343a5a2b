"""Saves that fail on one rank: no rank waits for it, and three in a row stop the run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs
from tests.faults.failing_disk import break_disk

# Every file that one rank alone may fail to write, each survived, two failures in a row at most.
SURVIVED = ["0:progress.json", "1:rng_", "-", "0:common.pt", "1:__1_", "-", "0:.metadata", "0:metadata.json", "-"]
SURVIVED += ["0:stage-", "0:state", "-", "0:manifest", "1:tensor", "-", "0:optimizer", "0:config.json"]
FATAL = ["0:progress.json"] * 3


@pytest.mark.parametrize("async_save", [False, True], ids=["at once", "in threads"])
@pytest.mark.timeout(200)
def test_failed_saves_are_survived_and_three_in_a_row_are_not(tmp_path: Path, async_save: bool) -> None:
    shards = jobs.build_shards(tmp_path, "train", 16)
    settings = {"steps": 30, "save_every": 1, "sample_every": 0, "prompts_per_step": 2, "keep_checkpoints": 99}
    settings["async_save"] = async_save
    config = jobs.write_config(tmp_path, shards, train=settings, rollout={"num_generations": 2, "max_new_tokens": 4})
    plan = [*SURVIVED, "-", *FATAL]
    code, said = jobs.run_forked(2, "train", config, before=partial(break_disk, plan))
    assert code == 17, said
    for step, fault in enumerate(plan, start=1):
        what = said.partition(f"checkpoint of step {step}")[2].partition("\n")[0]
        assert (" failed (" in what) == (fault != "-"), (fault, what)
        if fault != "-":
            name = fault.split(":")[1]
            assert any(sign in what for sign in (name, "No space left", "PytorchStreamWriter")), (fault, what)
    published = sorted(
        int(path.name.removeprefix("step_")) for path in (tmp_path / "run/checkpoints").glob("step_*[0-9]")
    )
    assert published == [step for step, fault in enumerate(plan, start=1) if fault == "-"]
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp-*"))
    failures = {step: int(row["checkpoint/save_failures"]) for step, row in read_metrics(tmp_path / "run")}
    assert failures[0] == 0
    for step, fault in enumerate(plan[:-1], start=1):
        assert failures[step] == (0 if fault == "-" else failures[step - 1] + 1), step
    last = len(plan)
    stopped = [line for line in said.splitlines() if "3 checkpoints in a row could not be saved" in line]
    assert len(stopped) == 1 and stopped[0].endswith(f"(step {last}, exit code 17)"), said
    outcome = json.loads((tmp_path / "run/logs/attempt_0/outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (17, last) and "\n" not in outcome["reason"]
