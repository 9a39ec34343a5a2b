"""What ranks do to measure the memory of a step: every case with a mesh of its own."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.ranks import layout
from tools.bench.memory_cases import CASES, settings
from tools.bench.memory_step import measure


def measured(directory: Path, cases: list[str]) -> None:
    """Write ``CASE/rank_R.json`` for each case."""
    for name in cases:
        folder = directory / name
        with layout(settings(CASES[name], folder).parallel) as mesh:
            found = measure(CASES[name], folder, mesh)
            (folder / f"rank_{mesh.rank}.json").write_text(json.dumps(found))
