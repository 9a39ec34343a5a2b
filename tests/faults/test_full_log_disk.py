"""A run whose telemetry can go nowhere is the same run: full log disk, W&B that never answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import jobs

HANGS = "import threading\n\n\ndef init(**settings):\n    threading.Event().wait()\n"


@pytest.mark.timeout(200)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_training_goes_on_unchanged(tmp_path: Path, shards: Path, whole: Path) -> None:
    run, modules = tmp_path / "run", tmp_path / "modules"
    (modules / "wandb").mkdir(parents=True)
    (modules / "wandb/__init__.py").write_text(HANGS)
    for name in ("facts.json", "config.yaml"):
        (run / name).mkdir(parents=True)
    (run / "metrics.jsonl").symlink_to("/dev/full")
    for name in ("tensorboard", "samples"):
        (run / name).write_text("in the way")
    config = jobs.write_config(tmp_path, shards, telemetry={"wandb_project": "p"})
    code, output = jobs.finish(
        jobs.start("train", config, "--nproc", 2, PYTHONPATH=f"{jobs.ROOT}:{modules}", VLMR1_LOG="WARNING")
    )
    assert code == 0, output
    assert jobs.checkpoint_hashes(run, 4) == jobs.checkpoint_hashes(whole, 4)
    for what in ("metrics.jsonl is not written", "tensorboard is not written", "facts.json is not written"):
        assert output.count(what) == 1, output
