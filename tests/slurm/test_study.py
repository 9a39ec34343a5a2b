"""A scaling study through a real SLURM: one and two nodes, two layouts, to its plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_vlmr1.cli.main import main
from tests import jobs
from tests.slurm.runs import Runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


def test_four_cells_to_their_plots(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.write_config(tmp_path, runs.shards, "base", data={"lanes": 16}, train={"steps": 3, "save_every": 0})
    facts = {"partition": "ci", "time": "10", "cpu_bind": "none", "tasks_per_node": 2}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(facts))
    sizes = {"dp": 1, "tp2": 2}
    study = {
        "config": "base.yaml",
        "nodes": [1, 2],
        "cluster": str(tmp_path / "cluster.yaml"),
        "axes": {"layout": {name: {"parallel.tensor_model_parallel_size": tp} for name, tp in sizes.items()}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    code = main(["scaling", "run", str(tmp_path / "study.yaml"), "--out", str(out), "--json"])
    cells = {cell["name"]: cell for cell in json.loads(capsys.readouterr().out)["cells"]}
    assert code == 0, cells
    assert {name: cell["ranks"] for name, cell in cells.items()} == {"n1-dp": 2, "n1-tp2": 2, "n2-dp": 4, "n2-tp2": 4}
    assert len({cell["job"] for cell in cells.values()}) == 4
    for name, cell in cells.items():
        facts = json.loads(Path(cell["run_dir"], "facts.json").read_text())
        assert (
            facts["parallel"]["world"] == cell["ranks"]
            and facts["parallel"]["tensor_model_parallel_size"] == sizes[name[3:]]
        )
    assert main(["scaling", "report", str(out), "--gpu", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["cells"]
    assert all(row["state"] == "done" and row["step_s"] > 0 and row["predicted_step_s"] > 0 for row in rows)
    assert all(row["strong_efficiency"] == 1.0 for row in rows if row["nodes"] == 1)
    for plot in ("efficiency", "tokens", "phases", "memory", "planned", "reward"):
        assert (out / f"{plot}.png").stat().st_size > 5000
