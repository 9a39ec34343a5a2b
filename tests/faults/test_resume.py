"""What a resumed run takes back, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.data.feed import truncate_ledger
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.telemetry.metrics import read_metrics
from megatron_vlmr1.train.changes import check_config
from tests import jobs


def damage(shards: Path, numbers: range) -> None:
    """Flip bytes of some samples."""
    opened = ShardSet.open(shards)
    for number in numbers:
        shard, key = opened.locate(number)
        tar = shards / shard
        data = bytearray(tar.read_bytes())
        at = data.find(b"question", data.find(f"{key}.json".encode()))
        data[at] ^= 1
        tar.write_bytes(data)


def weights_changed_by(factor: float, directory: Path) -> None:
    path = directory / "model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.timeout(300)
def test_what_a_resumed_run_repeats_and_refuses(tmp_path: Path) -> None:
    shards = jobs.build_shards(tmp_path, "train", 8)
    damage(shards, range(0, 8, 2))
    reference = tmp_path / "reference"
    shutil.copytree(hf_directory("asset:tiny_vlm"), reference)
    weights_changed_by(1.03, reference)
    written = jobs.write_config(
        tmp_path,
        shards,
        parallel={"tensor_model_parallel_size": 1},
        model={"reference_path": str(reference)},
        grpo={"beta": 0.04},
        train={"steps": 2, "save_every": 1},
    )
    run = tmp_path / "run"
    code, output = jobs.run_forked(1, "train", written)
    assert code == 0, output
    first = read_metrics(run)
    assert first[0][1]["grpo/kl"] > 1e-4  # the policy is not the reference
    ledger = (run / "ledger/rank_0.jsonl").read_bytes()
    assert ledger.count(b"\n") == 4

    shutil.rmtree(run / "checkpoints/step_2")
    code, output = jobs.run("train", written)
    assert code == 0, output
    assert "step_1" in output and "Warning" not in output
    assert (run / "ledger/rank_0.jsonl").read_bytes() == ledger
    again = read_metrics(run)
    assert [step for step, _ in again] == [0, 1]
    for name in ("reward/mean", "grpo/kl", "train/grad_norm", "data/skipped"):
        assert [row[name] for _, row in again] == [row[name] for _, row in first], name

    shutil.rmtree(run / "checkpoints/step_2")
    pinned = (reference / "model.safetensors").read_bytes()
    weights_changed_by(1.01, reference)
    for words, says in (
        ([], f"model.reference_path={reference}: not the weights that {run} was started with"),
        (["rollout.num_generations=3"], "was started with rollout.num_generations=4, not 3"),
    ):
        code, output = jobs.run_forked(1, "train", written, *words)
        assert code == 2 and says in output, output
    (reference / "model.safetensors").write_bytes(pinned)
    code, output = jobs.run("train", written, "--allow-config-change", "rollout.num_generations=3")
    assert code == 0, output
    change = "rollout.num_generations=4, not 3"
    assert f"config change let pass: {run} was started with {change}" in output
    assert json.loads((run / "facts.json").read_text())["config_changes"] == [f"step 1: {change}"]
    code, output = jobs.run_forked(1, "train", written, "rollout.num_generations=3", "train.steps=3")  # it remembers
    assert code == 0, output
    assert json.loads((run / "facts.json").read_text())["config_changes"] == [f"step 1: {change}"]


def test_a_config_of_another_version_is_compared_by_its_meaning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config.load(jobs.write_config(tmp_path, tmp_path))
    saved = cfg.model_dump(mode="json")
    del saved["recompute"], saved["grpo"]["truncated_importance"], saved["rollout"]["min_p"]
    check_config(cfg, saved)
    assert not caplog.records
    saved["grpo"]["gamma"] = 1
    saved["telepathy"] = {"on": True}
    check_config(cfg, saved)
    assert "keys that are not known here: grpo.gamma, telepathy" in caplog.text
    saved["rollout"]["min_p"] = 0.5
    with pytest.raises(ValueError, match="was started with rollout.min_p=0.5, not 0.0"):
        check_config(cfg, saved)


def test_every_changed_key_is_shown_and_some_may_be_let_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config.load(jobs.write_config(tmp_path, tmp_path))
    saved = cfg.model_dump(mode="json")
    saved["rollout"]["temperature"], saved["optimizer"]["lr"], saved["train"]["save_every"] = 0.5, 1e-9, 77
    lines = ["optimizer.lr=1e-09, not 0.0007", "rollout.temperature=0.5, not 1.0"]
    with pytest.raises(ValueError, match="pass --allow-config-change") as refused:
        check_config(cfg, saved)
    assert str(refused.value) == (
        f"{tmp_path / 'run'} was started with {'; '.join(lines)}: use another run_dir, or the old values to go on, or "
        "pass --allow-config-change"
    )
    assert not caplog.records
    assert check_config(cfg, saved, allow=True) == lines
    assert [record.message for record in caplog.records] == [
        f"config change let pass: {tmp_path / 'run'} was started with {line}" for line in lines
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("method", "sft"), ("task", "math"), ("seed", 5), ("precision.dtype", "bf16"), ("model.path", "elsewhere")),
        *(("model.freeze_vision", True), ("data.train", "other"), ("data.lanes", 4), ("data.shuffle_window", 9)),
    ],
)
def test_what_may_never_change(tmp_path: Path, key: str, value: object) -> None:
    cfg = config.load(jobs.write_config(tmp_path, tmp_path))
    saved = cfg.model_dump(mode="json")
    saved["optimizer"]["lr"] = 1e-9
    section, _, name = key.rpartition(".")
    (saved[section] if section else saved)[name] = value
    with pytest.raises(
        ValueError, match=f"was started with {key}={value}, not [^;]*: use another run_dir, or the old va"
    ):
        check_config(cfg, saved, allow=True)
    with pytest.raises(ValueError, match=f"{key}={value}, not ") as refused:
        check_config(cfg, saved)
    assert "optimizer.lr=1e-09" in str(refused.value) and "--allow" not in str(refused.value)


def test_layers_and_fp8_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """The layer spec may differ, FP8 if allowed; a run that was saved with precision as one word is understood."""
    cfg = config.load(jobs.write_config(tmp_path, tmp_path), ["precision=bf16"])
    saved = cfg.model_dump(mode="json")
    saved["model"]["spec"], saved["precision"] = "torch", "bf16"
    assert check_config(cfg, saved) == []
    saved["precision"] = {"dtype": "bf16", "fp8": "blockwise"}
    saved["model"]["spec"] = "te"
    with pytest.raises(ValueError, match="precision.fp8=blockwise, not none: .*pass --allow-config-change"):
        check_config(cfg, saved)
    assert check_config(cfg, saved, allow=True) == ["precision.fp8=blockwise, not none"]


def test_ledgers_are_cut_where_the_run_resumes(tmp_path: Path) -> None:
    rows = {0: (0, 2, 8), 1: (1, 9), 2: ()}
    for rank, positions in rows.items():
        lines = [f'{{"position":{position},"reason":"r"}}\n' for position in positions]
        (tmp_path / f"rank_{rank}.jsonl").write_text("".join(lines) + '{"posi' * (rank == 1))
    truncate_ledger(tmp_path, 8)
    kept = [(tmp_path / f"rank_{rank}.jsonl").read_text() for rank in rows]
    assert kept == ['{"position":0,"reason":"r"}\n{"position":2,"reason":"r"}\n', '{"position":1,"reason":"r"}\n', ""]
    truncate_ledger(tmp_path / "none", 8)
