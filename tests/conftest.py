"""Settings of every test: offline, one thread a process, this checkout first on the path of subprocesses.

With pytest-xdist a worker takes all tests of a directory whose tests start ranks, one after another, or a file of
tests/unit.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs before anything looks for them, but for a session of tests/gpu alone: all other tests are the CPU's."""
    places = [Path(os.path.abspath(arg.partition("::")[0])) for arg in config.args]
    if not places or any(ROOT / "tests" / "gpu" not in (place, *place.parents) for place in places):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: otherwise it takes a quarter of the time of building modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """This process as the only rank, in a process group of its own for each file."""
    from tests.distributed import ranks  # which imports torch; not every session needs it

    with ranks.alone() as built:
        yield built


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Say what the workers of pytest-xdist take at a time: a file of tests/unit, or another directory."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.startswith("tests/unit/") else file.rpartition("/")[0]

    return ByFile(config, log)
