"""The main job in its other forms: bf16 over a pipeline with a frozen tower, and supervised fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs


@pytest.mark.timeout(150)
def test_bf16_virtual_pipeline_recomputation_frozen_tower_with_reference(tmp_path: Path, shards: Path) -> None:
    config = jobs.write_config(
        tmp_path,
        shards,
        precision="bf16",
        parallel={
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
        recompute={"granularity": "full"},
        model={"freeze_vision": True},
        grpo={"beta": 0.04, "num_iterations": 2},
        train={"steps": 2, "save_every": 0},
    )
    code, output = jobs.run_forked(2, "train", config)
    assert code == 0, output
    for _, row in read_metrics(tmp_path / "run"):
        assert row["rollout/logprob_gap"] < 0.3  # bf16 has 8 bits
        assert row["train/grad_norm"] > 0 and row["train/skipped"] == 0
        assert row["grpo/ratio_max"] != 1.0  # the second iteration's
    base, trained = (HfWeights(hf_directory(path)) for path in ("asset:tiny_vlm", tmp_path / "run"))
    assert json.loads((hf_directory(tmp_path / "run") / "config.json").read_text())["dtype"] == "bfloat16"
    changed = {name for name in base.names() if not torch.equal(base.tensor(name).bfloat16(), trained.tensor(name))}
    assert changed and not any(name.startswith("visual.") for name in changed)


@pytest.mark.timeout(150)
def test_sft_on_two_data_parallel_ranks_learns_and_evaluates(tmp_path: Path, shards: Path) -> None:
    config = jobs.write_config(
        tmp_path,
        shards,
        method="sft",
        parallel={"tensor_model_parallel_size": 1},
        data={"train": str(shards), "evaluate": {"heldout": str(shards)}},
        train={"steps": 12, "save_every": 0, "evaluate_every": 12},
        evaluate={"limit": 8, "sampled": False},
    )
    code, output = jobs.run("train", config, "--nproc", 2)
    assert code == 0, output
    assert "Warning" not in output
    rows = [row for _, row in read_metrics(tmp_path / "run")]
    assert rows[0]["train/loss"] > rows[-1]["train/loss"] > 0
    assert rows[-1]["evaluate/heldout/samples"] == 8 and "evaluate/heldout/acc50" in rows[-1]


@pytest.mark.timeout(150)
def test_generation_on_copies_of_the_weights_in_another_layout(tmp_path: Path, shards: Path, whole: Path) -> None:
    """Tensor-parallel training, one copy of the model on each rank for generation; the same run as without copies."""
    config = jobs.write_config(tmp_path, shards, rollout={"tensor_model_parallel_size": 1})
    code, output = jobs.run_forked(2, "train", config)
    assert code == 0, output
    rows = [[row for _, row in read_metrics(run)] for run in (tmp_path / "run", whole)]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["rollout/logprob_gap"] <= 1e-4 and ours["reward/failed_frac"] == 0
        for key in ("reward/mean", "reward/std", "rollout/length_mean", "train/tokens", "data/consumed"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-3)
