"""One private SLURM for all tests here, and small runs on it; skipped, with the reason, where it cannot be."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import jobs
from tests.slurm.one_machine import OneMachine, missing
from tests.slurm.runs import Runs


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneMachine]:
    """A SLURM on this machine, which this process's commands use."""
    if reason := missing():
        pytest.skip(reason)
    slurm = OneMachine(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(slurm.conf))
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


@pytest.fixture(autouse=True)
def _no_job_is_left(machine: OneMachine) -> Iterator[None]:
    """A test that fails leaves its jobs to nobody."""
    yield
    subprocess.run(["scancel", "--user=root"], capture_output=True, check=False, timeout=60)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes."""
    return jobs.build_shards(tmp_path_factory.mktemp("data"), "train", 64)


@pytest.fixture(scope="session")
def runs(machine: OneMachine, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A directory with runs on that SLURM."""
    return Runs(machine, shards, tmp_path_factory.mktemp("runs"))
