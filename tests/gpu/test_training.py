"""The real program on the GPU, in processes of its own: a few steps, checkpoints to and from the CPU, FP8's rewards."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs
from tests.gpu.conftest import needs_cuda

CPU = {"CUDA_VISIBLE_DEVICES": ""}
ONE = {"tensor_model_parallel_size": 1, "timeout_s": 300}
LIMIT_S = 140  # of one run


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what other tests have left: preflight wants the GPU's memory free
    return jobs.build_shards(tmp_path_factory.mktemp("gpu_training"), "train", 64)


def train(config: Path | str, *overrides: str, limit_s: float = LIMIT_S, **variables: str) -> None:
    code, output = jobs.finish(jobs.start("train", config, "--nproc", 1, *overrides, **variables), limit_s)
    assert code == 0, output[-3000:]


def rows(run: Path, steps: int) -> list[dict[str, float]]:
    """Return the metrics of a run that has taken so many steps, none of them skipped."""
    found = read_metrics(run)
    assert [step for step, _ in found] == list(range(steps))
    for _, row in found:
        assert math.isfinite(row["train/grad_norm"]) and not row["train/skipped"], row
    return [row for _, row in found]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("precision", "spec", "gap"), [("fp32", "torch", 1e-3), ("bf16", "auto", 0.5)])
def test_the_quickstart_trains_three_steps(shards, tmp_path, report, precision, spec, gap):
    train(
        "configs/quickstart.yaml",
        *(f"run_dir={tmp_path / 'run'}", f"data.train={shards}", f"precision={precision}", f"model.spec={spec}"),
        *(f"data.evaluate.{name}={shards}" for name in ("heldout", "ood")),
        *("parallel.tensor_model_parallel_size=1", "train.steps=3", "train.prompts_per_step=8", "rewards.workers=1"),
    )
    found = rows(tmp_path / "run", 3)
    report(f"{precision}, largest log-prob gap of a step", max(row["rollout/logprob_gap"] for row in found), gap)


@pytest.mark.timeout(600)
def test_a_checkpoint_goes_from_the_cpu_to_the_gpu_and_back(shards, tmp_path, report):
    """Two steps each, in fp32; on the GPU by Transformer Engine's layers, where it is there, whose products are TF32's.

    What is loaded is what was saved: its sha256 is checked, and generation agrees with training.
    """
    sections = {"parallel": ONE, "launch": {"preflight": "off"}}
    config = jobs.write_config(tmp_path, shards, **sections, train={**jobs.SMALL["train"], "steps": 6})
    for steps, variables in ((2, CPU), (4, {}), (6, CPU)):
        train(config, f"train.steps={steps}", **variables)
    found = rows(tmp_path / "run", 6)
    assert [row["data/consumed"] for row in found] == [4.0 * (step + 1) for step in range(6)]
    report("largest log-prob gap of a step", max(row["rollout/logprob_gap"] for row in found), 0.05)
    straight = jobs.write_config(tmp_path, shards, "straight", **sections, train={**jobs.SMALL["train"], "steps": 3})
    train(straight, **CPU)
    # Only the third is on the GPU; in later ones tokens may differ, where two are equally likely.
    ours, theirs = found[:3], rows(tmp_path / "straight", 3)
    apart = max(abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) for a, b in zip(ours, theirs, strict=True))
    report("gradient norms of the first three steps, relative", apart, 0.05)


def rewards(folder: Path, shards: Path, name: str, steps: int = 100, **precision: str) -> list[float]:
    """Return the mean rewards of the last fifth of so many steps."""
    sections = {"parallel": ONE, "launch": {"preflight": "off"}, "precision": {"dtype": "bf16", **precision}}
    work = {**jobs.SMALL["train"], "steps": steps, "prompts_per_step": 16, "save_every": 0, "sample_every": 0}
    train(jobs.write_config(folder, shards, name, **sections, train=work), limit_s=800)
    return [row["reward/mean"] for row in rows(folder / name, steps)][-steps // 5 :]


@pytest.fixture(scope="module")
def rewards_in_bf16(shards, tmp_path_factory) -> list[float]:
    return rewards(tmp_path_factory.mktemp("bf16"), shards, "bf16")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "delayed"])
@pytest.mark.usefixtures("engine")
def test_rewards_in_fp8_are_those_of_bf16(shards, tmp_path, report, request, recipe):
    """Means over the last 20 of 100 steps, apart by no more than four times what chance makes of means of 20."""
    needs_cuda("training in FP8")
    curves = rewards(tmp_path, shards, recipe, fp8=recipe), request.getfixturevalue("rewards_in_bf16")
    chance = math.sqrt(sum(stdev(curve) ** 2 / len(curve) for curve in curves))
    apart = abs(fmean(curves[0]) - fmean(curves[1]))
    report(f"{recipe} to bf16, mean reward of the last 20 steps", apart, 4 * chance)
