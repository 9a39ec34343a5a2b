"""Which batches are kept, and what the command to replay one says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.store import Store
from megatron_vlmr1.train.bad_batches import kept_if_bad


def fake_run(folder: Path, **sections: Any) -> Any:
    cfg = config.parse(
        {"run_dir": str(folder), "model": {"path": "m"}, "data": {"train": "d"}, "precision": "fp32", **sections},
        "test",
    )
    return SimpleNamespace(
        cfg=cfg,
        run_dir=folder,
        updater=SimpleNamespace(not_finite=0),
        mesh=SimpleNamespace(rank=0, dp_rank=0, dp_size=1, world=2, is_model_leader=True),
        checkpoints=SimpleNamespace(store=Store(folder / "checkpoints", 1)),
    )


def bad(run: Any, step: int, **batch: Any) -> None:
    with kept_if_bad(run, step, **batch):
        run.updater.not_finite += 1


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    with kept_if_bad(run, 0, 0, []):
        pass
    assert not (tmp_path / "bad_batches").exists()
    for step in range(1, 13):
        bad(run, step, first=step, groups=[])
    kept = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "bad_batches").iterdir())
    assert kept == list(range(5, 13))


def test_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad(fake_run(tmp_path, telemetry={"wandb_project": "p"}), 7, first=0, groups=[])
    bad(fake_run(tmp_path, method="sft"), 8)
    (tmp_path / "checkpoints/step_6").mkdir(parents=True)
    bad(fake_run(tmp_path, grpo={"beta": 0.0}), 9, first=0, groups=[])
    first, sft, later = (record.message.partition(": vlmr1 ")[2].split() for record in caplog.records)
    train = ["train", f"{tmp_path}/config.yaml", "--nproc", "2"]
    assert first[:4] == sft[:4] == later[:4] == train
    assert set(first) >= {
        "model.path=m",
        "model.reference_path=m",
        "telemetry.wandb_project=null",
        "debug.first_step=7",
    }
    assert f"debug.replay_rollouts={tmp_path}/bad_batches" in first
    assert set(sft[4:]) == {
        f"run_dir={tmp_path}/bad_batches/replay_8",
        "model.path=m",
        "debug.first_step=8",
        "train.steps=9",
        "train.evaluate_every=0",
    }
    assert f"model.path={tmp_path}/checkpoints/step_6" in later and not any("reference" in word for word in later)


def test_the_command_is_one_that_a_config_with_a_best_checkpoint_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"train": "d", "evaluate": {"val": "v"}}
    best = {"metric": "evaluate/val/accuracy", "better": "higher"}
    run = fake_run(tmp_path, method="sft", data=data, train={"evaluate_every": 5, "keep_best": best})
    (tmp_path / "config.yaml").write_text(config.dump(run.cfg))
    bad(run, 7)
    words = caplog.records[0].message.partition("--nproc 2 ")[2].split()
    assert config.load(tmp_path / "config.yaml", words).train.keep_best is None


def test_a_batch_that_cannot_be_kept_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad_batches").write_text("in the way")
    with pytest.raises(KeyError):
        with kept_if_bad(run := fake_run(tmp_path), 3, 0, []):
            run.updater.not_finite += 1
            raise KeyError
    assert "step 4 was not finite and skipped; its batch is not kept" in caplog.text
