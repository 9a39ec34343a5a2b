"""The fault matrix, as a user runs it: two rows, and the whole short form with ``-m slow``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlmr1.drill.matrix import ROWS
from tests.jobs import ROOT

SHORT = [row.name for row in ROWS if row.short]


@pytest.mark.timeout(900)  # the short form takes a minute or so on two idle cores
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--row", "sigusr1", "--row", "bad-numbers"], ["sigusr1", "bad-numbers"]),
        pytest.param(["--short"], SHORT, marks=pytest.mark.slow),
    ],
    ids=["two rows", "short"],
)
def test_every_figure_is_met(words: list[str], names: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_vlmr1.cli", "drill", *words, "--json", "--dir", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] and [row["row"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert row["passed"] and f"drill: ok in {row['seconds']:.0f} s: {row['measured']}" in done.stderr
