"""The short form of the fault matrix, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlmr1.drill.matrix import ROWS
from tests.jobs import ROOT


@pytest.mark.timeout(900)  # a minute or so on two idle cores
def test_the_short_form_meets_every_figure(tmp_path: Path) -> None:
    words = ("drill", "--short", "--json", "--dir", str(tmp_path / "runs"))
    command = [sys.executable, "-m", "megatron_vlmr1.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] and [row["row"] for row in found["rows"]] == [row.name for row in ROWS if row.short]
    for row in found["rows"]:
        assert row["passed"] and f"drill: ok in {row['seconds']:.0f} s: {row['measured']}" in done.stderr
