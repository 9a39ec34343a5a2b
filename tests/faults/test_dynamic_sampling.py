"""Refilled batches through the real program: killed in the middle of a refill, and without a score that differs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs

# Only the format is rewarded, which is all or nothing: soon all four completions of most prompts score alike.
REFILLING = {
    "parallel": {"tensor_model_parallel_size": 1},
    "grpo": {"algorithm": "dapo", "dynamic_sampling_rounds": 8},
    "rewards": {"weights": {"format": 1.0}},
    "train": {"steps": 3, "save_every": 1},
}


@pytest.mark.timeout(250)
def test_killed_in_a_refill_it_resumes_bit_for_bit(tmp_path: Path, shards: Path) -> None:
    whole = jobs.write_config(tmp_path, shards, "whole", **REFILLING)
    code, output = jobs.run_forked(2, "train", whole)
    assert code == 0, output
    rows = [row for _, row in read_metrics(tmp_path / "whole")]
    rounds = [row["grpo/rounds"] for row in rows]
    assert max(rounds) >= 3  # or there would be no refill to interrupt
    assert [row["data/consumed"] for row in rows] == [4 * sum(rounds[: i + 1]) for i in range(3)]
    for row in rows:
        assert row["train/grad_norm"] > 0 and row["train/skipped"] == 0
        # four groups drawn a round; with fewer than eight rounds, four of them were found to learn from
        found = (1 - row["grpo/zero_std_groups"]) * 4 * row["grpo/rounds"]
        assert found >= 4 - 1e-6 or row["grpo/rounds"] == 8

    config = jobs.write_config(tmp_path, shards, "run", **REFILLING)
    job = jobs.start("train", config, "--nproc", 2)
    jobs.wait_for(job, "round 2: scores differ in")
    for rank in jobs.ranks(job.pid):
        rank.send_signal(signal.SIGKILL)
    assert jobs.finish(job)[0] not in (0, 85)
    done = len(read_metrics(tmp_path / "run"))
    assert done == next(i for i, n in enumerate(rounds) if n >= 3)  # the killed step left no trace
    code, output = jobs.run_forked(2, "train", config)
    assert code == 0, output
    assert f"step_{done}" in output and "resuming from" in output
    assert jobs.checkpoint_hashes(tmp_path / "run", 3) == jobs.checkpoint_hashes(tmp_path / "whole", 3)
    for step in range(3):
        name = f"samples/step_{step}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.timeout(150)
def test_it_ends_when_no_score_ever_differs(tmp_path: Path, shards: Path) -> None:
    """Three tokens never are an answer: every score is zero, and all are as long as can be."""
    config = jobs.write_config(
        tmp_path,
        shards,
        parallel={"tensor_model_parallel_size": 1},
        rollout={"max_new_tokens": 3},
        grpo={"dynamic_sampling_rounds": 3, "overlong_buffer_tokens": 2},
        rewards={"weights": {"format": 1.0}},
        train={"steps": 2, "save_every": 0},
    )
    code, output = jobs.run_forked(1, "train", config)
    assert code == 0, output
    rows = [row for _, row in read_metrics(tmp_path / "run")]
    assert [row["grpo/rounds"] for row in rows] == [3, 3] and [row["data/consumed"] for row in rows] == [12, 24]
    for row in rows:
        assert (row["grpo/zero_std_groups"], row["train/skipped"], row["train/tokens"]) == (1, 1, 0)
        assert (row["reward/format"], row["reward/overlong"], row["reward/mean"]) == (0, -1, -1)
        assert all(value == value for value in row.values())
    before, after = (HfWeights(hf_directory(path)) for path in ("asset:tiny_vlm", tmp_path / "run"))
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names())
