"""Debug switches through the real program: save and replay a rollout, generate without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs
from tests.distributed import plain

STEPS = 2
DP2 = {"tensor_model_parallel_size": 1}
TRAIN = {"steps": STEPS, "save_every": 1, "optimizer_format": "fully_reshardable"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build_shards(tmp_path_factory.mktemp("data"), "train", 32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run on two data-parallel ranks that saved its rollouts."""
    folder = tmp_path_factory.mktemp("saved")
    config = jobs.write_config(folder, shards, parallel=DP2, train=TRAIN, debug={"save_rollouts": True})
    code, output = jobs.run_forked(2, "train", config)
    assert code == 0, output
    return folder / "run"


def replayed(folder: Path, shards: Path, saved: Path, nproc: int, *overrides: str, **sections: dict) -> Path:
    debug = {"replay_rollouts": str(saved / "rollouts")}
    config = jobs.write_config(folder, shards, **{"parallel": DP2, "train": TRAIN, "debug": debug, **sections})
    code, output = jobs.run_forked(nproc, "train", config, *overrides)
    assert code == 0, output
    return folder / "run"


def test_a_replay_on_the_same_ranks_is_the_same_run_bit_for_bit(tmp_path: Path, shards: Path, saved: Path) -> None:
    run = replayed(tmp_path, shards, saved, 2)
    for step in (1, STEPS):
        assert jobs.checkpoint_hashes(run, step) == jobs.checkpoint_hashes(saved, step)
    for (_, row), (_, other) in zip(read_metrics(run), read_metrics(saved), strict=True):
        for name in ("reward/mean", "reward/iou", "train/grad_norm", "train/tokens", "grpo/entropy", "data/consumed"):
            assert row[name] == other[name], name
        assert row["perf/lm_flops"] < other["perf/lm_flops"]  # nothing was generated
        assert row["perf/tflops"] > 0 and not {"perf/mfu_lm", "perf/mfu_vit"} & row.keys()  # a CPU has no peak here
    facts = json.loads((run / "facts.json").read_text())
    assert (facts["reward_pids"], facts["scored"]) == ([], 0)
    assert not list(run.rglob("rewards.log")) and list(saved.rglob("rewards.log"))
    assert sorted(p.parent.name for p in (saved / "rollouts").rglob("*.msgpack")) == ["step_0"] * 2 + ["step_1"] * 2


def test_a_replay_weighs_rewards_as_it_is_told(tmp_path: Path, shards: Path, saved: Path) -> None:
    """Saved values, made by other weights and with a penalty or without, count for nothing."""
    weights = ["rewards.weights.iou=2", "rewards.weights.format=0.5", "grpo.overlong_buffer_tokens=4"]
    run = replayed(tmp_path, shards, saved, 2, "train.steps=1", *weights)
    (_, row), (_, other) = read_metrics(run)[0], read_metrics(saved)[0]
    assert "rollout/tokens_per_s" not in row and "reward/overlong" not in other
    value = 2 * row["reward/iou"] + 0.5 * row["reward/format"] + row["reward/overlong"]
    assert row["reward/mean"] == pytest.approx(value, abs=1e-6) != other["reward/mean"]


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [(1, ["train.steps=1"]), (2, ["train.steps=1", "parallel.tensor_model_parallel_size=2"]), (2, ["train.steps=1"])],
    ids=["one rank", "tp2", "dp2 unbalanced"],
)
def test_a_replay_on_other_ranks_has_the_same_gradients(
    tmp_path: Path, shards: Path, saved: Path, nproc: int, overrides: list[str]
) -> None:
    run = replayed(tmp_path, shards, saved, nproc, *overrides, "train.balance=false")
    (_, row), (_, expected) = read_metrics(run)[0], read_metrics(saved)[0]
    for name in ("train/grad_norm", "grpo/entropy", "reward/mean", "train/tokens"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5), name
    assert row["rollout/logprob_gap"] <= 1e-4
    start = plain.read(hf_directory("asset:tiny_vlm"))
    moved, other = (plain.flat(plain.read(r / "checkpoints/step_1/hf")) - plain.flat(start) for r in (run, saved))
    assert float((moved - other).norm() / other.norm()) < 1e-2  # Adam divides gradients near zero by themselves


def test_what_was_not_saved_is_refused(tmp_path: Path, shards: Path, saved: Path) -> None:
    debug = {"replay_rollouts": str(saved / "rollouts")}
    config = jobs.write_config(tmp_path, shards, parallel=DP2, train=TRAIN, debug=debug)
    code, output = jobs.run_forked(1, "train", config, "seed=1")
    assert code == 2 and "is not what the rollout was made of" in output
    code, output = jobs.run_forked(1, "train", config, "train.steps=3")
    assert code == 2 and "step_2/rank_0.msgpack: No such file" in output
    words = [f"run_dir={tmp_path / 'other'}", "rewards.weights.format_rec=1"]
    code, output = jobs.run_forked(1, "train", config, *words)
    assert code == 2 and "was scored without format_rec" in output
    code, output = jobs.run("train", config, f"debug.replay_rollouts={tmp_path / 'gone'}")
    assert code == 2 and "gone: no such directory" in output


def test_generate_and_score_without_training(tmp_path: Path, shards: Path, saved: Path) -> None:
    debug = {"skip_update": True, "save_rollouts": True}
    config = jobs.write_config(tmp_path, shards, parallel=DP2, train=TRAIN, debug=debug)
    code, output = jobs.run_forked(2, "train", config)
    assert code == 0, output
    run = tmp_path / "run"
    rows = [row for _, row in read_metrics(run)]
    assert len(rows) == STEPS and all("reward/mean" in row and row["rollout/tokens"] > 0 for row in rows)
    assert not any("train/loss" in row or "train/grad_norm" in row for row in rows)
    assert rows[0]["reward/mean"] == read_metrics(saved)[0][1]["reward/mean"]
    start, end = plain.read(hf_directory("asset:tiny_vlm")), plain.read(run / f"checkpoints/step_{STEPS}/hf")
    assert (plain.flat(start) == plain.flat(end)).all()
    # An optimizer that never stepped was saved, and goes on from there.
    code, output = jobs.run_forked(2, "train", config, f"train.steps={STEPS + 1}")
    assert code == 0 and [step for step, _ in read_metrics(run)] == list(range(STEPS + 1)), output
    # Its rollouts can be trained on: the first one is that of the run that trained.
    (tmp_path / "trained").mkdir()
    trained = replayed(tmp_path / "trained", shards, run, 2, "train.steps=1")
    assert jobs.checkpoint_hashes(trained, 1) == jobs.checkpoint_hashes(saved, 1)
