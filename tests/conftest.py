"""Settings of every test: offline, one thread a process, this checkout first on the path of subprocesses.

With pytest-xdist one worker takes all tests that start ranks, which have two cores of their own to wait for, one after
another; the others share out the files of tests/unit.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these tests are the CPU's; tests/gpu asks for its own
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what pytest-xdist may run side by side (`--dist loadgroup`)."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(item.path.name if folder == "unit" else "ranks"))
