"""One data set and one undisturbed run for all tests of this directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build_shards(tmp_path_factory.mktemp("data"), "train", 64)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = jobs.run_forked(2, "train", jobs.write_config(folder, shards))
    assert code == 0, output
    run = folder / "run"
    assert all(row["train/grad_norm"] > 0 for _, row in read_metrics(run))  # or there would be nothing to resume
    return run
