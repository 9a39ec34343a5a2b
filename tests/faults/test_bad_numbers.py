"""Steps that are not finite: skipped by all, kept for a replay, and the third in a row ends the run."""

from __future__ import annotations

import json
import math
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from megatron_vlmr1.checkpoint.store import verify
from megatron_vlmr1.data.rollouts import first_position, read_rollout
from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs
from tests.faults.bad_numbers import flip, spoil

DP2 = {"tensor_model_parallel_size": 1}


@pytest.mark.timeout(200)
def test_three_in_a_row_end_the_run_and_each_can_be_replayed(tmp_path: Path, shards: Path) -> None:
    config = jobs.write_config(
        tmp_path,
        shards,
        parallel=DP2,
        grpo={"truncated_importance": 2.0},
        train={"steps": 9, "save_every": 2, "async_save": False},
    )
    code, said = jobs.run_forked(2, "train", config, before=partial(spoil, "1", {1, 3, 4, 5}))
    assert code == 17, said
    run = tmp_path / "run"
    rows = dict(read_metrics(run))
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert [rows[step]["train/skipped"] for step in rows] == [0, 1, 0, 1, 1]
    assert [math.isnan(rows[step]["train/loss"]) for step in rows] == [False, True, False, True, True]
    assert all("train/grad_spike" not in row for row in rows.values())  # too early to say
    outcome = json.loads((tmp_path / "run/logs/attempt_0/outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (17, 5) and "not finite in three" in outcome["reason"]

    # The last checkpoint holds what the last good step left: step 3 was the last one that trained.
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir() if path.name.startswith("step_")) == ["step_2", "step_4"]
    assert verify(checkpoints / "step_4") == [] == verify(checkpoints / "step_2")
    assert json.loads((checkpoints / "step_4/state/progress.json").read_text())["bad_steps"] == 1

    bad = run / "bad_batches"
    assert sorted(path.name for path in bad.iterdir()) == ["step_1", "step_3", "step_4", "step_5"]
    assert first_position(bad, 5) == 5 * 4 and sorted(read_rollout(bad, 5)) == [20, 21, 22, 23]
    commands = re.findall(r"ERROR step (\d+) was not finite and skipped; .* weights of (\S+): vlmr1 (.*)", said)
    assert [int(step) for step, _, _ in commands] == [2, 4, 5, 6]
    assert [Path(base).name for _, base, _ in commands] == ["asset:tiny_vlm", "step_2", "step_4", "step_4"]

    code, output = jobs.run_forked(1, *shlex.split(commands[-1][2]))
    assert code == 0, output
    [(step, row)] = read_metrics(bad / "replay_5")
    assert (step, row["train/skipped"], row["data/consumed"]) == (5, 1.0, 24)
    assert math.isnan(row["train/loss"]) and math.isnan(row["train/grad_norm"])
    assert "step 6 was not finite" in output


@pytest.mark.timeout(200)
def test_a_bit_that_flips_in_one_copy_ends_the_run_before_it_is_saved(tmp_path: Path, shards: Path) -> None:
    config = jobs.write_config(tmp_path, shards, parallel=DP2, train={"save_every": 1})
    code, said = jobs.run_forked(2, "train", config, before=partial(flip, "1", {1}))
    assert code == 17, said
    outcome = json.loads((tmp_path / "run/logs/attempt_0/outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (17, 2)
    name = "language.decoder.final_layernorm.weight"
    assert outcome["reason"].startswith(f"{name} differs from the other copies: either rank 0 on "), outcome
    checkpoints = tmp_path / "run/checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith("step_")] == ["step_1"]
    assert verify(checkpoints / "step_1") == [] and not (tmp_path / "run/bad_batches").exists()
