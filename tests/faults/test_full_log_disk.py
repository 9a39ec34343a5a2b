"""A run whose telemetry can go nowhere is the same run: full log disk, W&B that never answers."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest

from tests import jobs

HANGS = "import threading\n\n\ndef init(**settings):\n    threading.Event().wait()\n"


def import_from(modules: Path) -> None:
    """Find the modules in that folder before all others; say warnings only."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]
    sys.path.insert(0, str(modules))
    os.environ["VLMR1_LOG"] = "WARNING"


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
    code, output = jobs.run_forked(2, "train", config, before=partial(import_from, modules))
    assert code == 0, output
    assert jobs.checkpoint_hashes(run, 4) == jobs.checkpoint_hashes(whole, 4)
    for what in ("metrics.jsonl is not written", "tensorboard is not written", "facts.json is not written"):
        assert output.count(what) == 1, output
