"""Tests of what only a GPU can show: `python -m pytest tests/gpu` on a machine that has one, in a session of their own.

Elsewhere all of them are skipped, with one reason. With VLMR1_GPU_TESTS_ON_CPU=1 their bodies run on the CPU as far as
they make sense there, so that they can be written without a GPU. What they measure is printed at the end.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_random_checkpoint

HERE = Path(__file__).parent
ON_CPU = os.environ.get("VLMR1_GPU_TESTS_ON_CPU") == "1"
_COUNT = pytest.StashKey[int]()

Report = Callable[[str, float, float], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all of them."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Count those that are left when options have chosen."""
    session.config.stash[_COUNT] = sum(HERE in item.path.parents for item in session.items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip it where there is no GPU; all for one reason, of which pytest's summary makes one line."""
    if not torch.cuda.is_available() and not ON_CPU:
        count = item.config.stash[_COUNT]
        pytest.skip(
            f"no CUDA device: {count} tests of tests/gpu did not run; run `python -m pytest tests/gpu` on a GPU machine"
        )


def needs_cuda(why: str) -> None:
    """Skip a test whose body means nothing on a CPU."""
    if not torch.cuda.is_available():
        pytest.skip(f"only on CUDA: {why}")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine, or on a CPU the stand-ins for its modules."""
    if not torch.cuda.is_available():
        from tests import te_modules

        te_modules.install(monkeypatch)
    elif importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed: pip install --no-build-isolation -e '.[cuda]'")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose sides are multiples of 16, as FP8 wants them."""
    return write_random_checkpoint(tmp_path_factory.mktemp("gpu") / "model", seed=3)


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Keep a measured number for the end of the session, and hold it against its bound."""

    def measured(name: str, value: float, bound: float) -> None:
        record_property("measured", f"{name}: {value:.3g} (bound {bound:.3g})")
        assert value <= bound, f"{name}: {value:.3g} is above {bound:.3g}"

    return measured


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was measured."""
    lines = [
        f"{report.nodeid.rpartition('/')[2]}: {value}"
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", [])
        if name == "measured" and report.when == "call"
    ]
    if lines:
        terminalreporter.section(
            f"measured on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'}"
        )
        for line in lines:
            terminalreporter.write_line(line)
