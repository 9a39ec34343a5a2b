"""Scaling studies: the grid, what becomes of its cells, and the figures of the report against hand-made numbers."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_vlmr1 import config
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.launch.study import DONE, FAILED, REFUSED, WAITING, Study
from megatron_vlmr1.plan.hardware import read as read_hardware
from megatron_vlmr1.plan.study import Cell, cells, read
from megatron_vlmr1.report import scaling
from megatron_vlmr1.report.scaling_rows import read as read_rows
from megatron_vlmr1.runtime.attempts import write_outcome
from megatron_vlmr1.telemetry.files import json_line
from tests.jobs import ROOT, build_shards, command_line, start, write_config

STEPS = 5
CPU = read_hardware(ROOT / "configs" / "hardware" / "cpu.yaml")
STUDY = {
    "config": "base.yaml",
    "nodes": [4, 1],
    "ranks_per_node": 2,
    "scaling": ["strong", "weak"],
    "overrides": {"train.steps": STEPS},
    "axes": {
        "layout": {"dp": {"parallel.tensor_model_parallel_size": 1}, "tp2": {"parallel.tensor_model_parallel_size": 2}},
        "batch": {"b8": {"train.prompts_per_step": 8}},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    return write_config(folder, build_shards(folder, "train", 8), "base", data={"lanes": 8})


def write_study(folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def grid(folder: Path, base: Path, **changes: object) -> list[Cell]:
    return cells(read(write_study(folder, **changes)), 2, base, folder / "out")


def test_the_grid_has_every_point_once(tmp_path: Path, base: Path) -> None:
    found = {cell.name: cell for cell in grid(tmp_path, base)}
    weak, strong = ["n4-dp-b8-weak", "n4-tp2-b8-weak"], ["n4-dp-b8-strong", "n4-tp2-b8-strong"]
    assert sorted(found) == sorted(["n1-dp-b8", "n1-tp2-b8", *weak, *strong])
    assert found["n1-dp-b8"].scaling == ("strong", "weak")
    assert [found[name].ranks for name in ("n1-dp-b8", *weak)] == [2, 8, 8]
    assert "train.prompts_per_step=32" in found["n4-dp-b8-weak"].overrides
    assert "train.prompts_per_step=8" in found["n4-dp-b8-strong"].overrides
    assert found["n4-tp2-b8-weak"].point == {"layout": "tp2", "batch": "b8"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node": [1]}, "unknown key node; did you mean nodes?"),
        ({"nodes": []}, "nodes: "),
        ({"nodes": [2, 2]}, "nodes=[2, 2] names one twice"),
        ({"scaling": ["weak", "weak"]}, "scaling=['weak', 'weak'] names one twice"),
        ({"axes": {"layout": {}}}, "axes.layout has no point"),
        ({"axes": {"layout": {"../x": {}}}}, "label '../x'"),
        ({"overrides": {"run_dir": "x"}}, "run_dir is set by the study"),
        ({"overrides": {"train.step": 3}}, "cell n1-dp-b8: "),
        ({"nodes": [2, 3], "axes": {"b": {"odd": {"train.prompts_per_step": 7}}}}, "cell n3-odd-weak: "),
        ({"scaling": ["fast"]}, "scaling.0: "),
        ({"time": "10:00"}, "time and at_once are for jobs of a cluster"),
        ({"cluster": "cpu"}, "ranks_per_node is for local jobs"),
        ({"cluster": "none", "ranks_per_node": None}, "none: no such cluster file"),
    ],
)
def test_a_wrong_study_is_one_line(
    changes: dict, words: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, **{**changes, "config": str(base)})
    assert main(["scaling", "run", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_or_foreign_study_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["run", str(tmp_path / "none.yaml")], ["report", str(tmp_path)]):
        assert main(["scaling", *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "cells.json").write_text('{"cells": 3}')
    assert main(["scaling", "report", str(tmp_path)]) == 2
    assert "not what a study writes" in capsys.readouterr().err


class FakeJobs:
    """Runs that take no time: each ends as `ends` says, with a step time of its own."""

    at_once, poll_s, outlive = 2, 0.0, True

    def __init__(self, ends: dict[str, int] | None = None) -> None:
        self.ends = ends or {}
        self.started: list[str] = []
        self.retried: list[str] = []
        self.stopped = False

    def start(self, cell: Cell, run_dir: Path, retry: bool) -> str:
        self.started.append(cell.name)
        self.retried += [cell.name] * retry
        code = self.ends.get(cell.name, 0)
        attempt = run_dir / "logs" / f"attempt_{len(list(run_dir.glob('logs/*')))}"
        attempt.mkdir(parents=True)
        if code >= 0:
            write_outcome(attempt, f"ended with {code}", code, STEPS)
            write_metrics(run_dir, cell)
        else:
            self.log(run_dir).write_text("first\nno space on n2\n")
        return f"job-{cell.name}"

    def alive(self, job: str) -> bool:
        return False

    def stop(self) -> None:
        self.stopped = True

    def log(self, run_dir: Path) -> Path:
        return run_dir / "job.log"


def write_metrics(run_dir: Path, cell: Cell) -> None:
    """Steps of 2 s on one node; of 1 s with the same prompts on four, of 2.5 s with four times as many."""
    step_s = {1: 2.0, 4: 2.5 if "weak" in cell.name else 1.0}[cell.nodes]
    prompts = 32 if cell.name.endswith("weak") else 8
    rows = []
    for step in range(STEPS):
        row = {"step": step, "data/consumed": prompts * (step + 1), "perf/step_s": step_s + (90 if step == 0 else 3)}
        row |= {"time/save_exposed": 3.0, "time/rollout": step_s / 2, "time/update": step_s / 4}
        row |= {"perf/tokens_per_s_per_gpu": 100 * prompts / step_s / cell.ranks, "reward/mean": step / 10}
        rows.append(row | {"perf/mfu_lm": 0.3, "perf/mfu_vit": 0.05, "gpu/mem_bytes": 7e9 + step, "host/rss_bytes": 1})
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(json_line, rows)))


def run_study(folder: Path, base: Path, jobs: FakeJobs, retry_failed: bool = False) -> Study:
    study = Study("study", grid(folder, base), base, folder / "out", jobs, 1, lambda line: None)
    study.run(retry_failed)
    return study


def test_a_cluster_beside_the_study_says_how_many_ranks_a_node_has(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("tasks_per_node: 3\n")
    path = write_study(tmp_path, config=str(base), cluster="mine.yaml", ranks_per_node=None)
    assert main(["scaling", "run", str(path), "--dry-run", "--json"]) == 0
    assert {cell["ranks"] for cell in json.loads(capsys.readouterr().out)["cells"]} == {3, 12}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["scaling", "run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "sbatch: not found" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_figures_of_a_finished_study(tmp_path: Path, base: Path) -> None:
    study = run_study(tmp_path, base, FakeJobs())
    assert [state.state for state in study.states] == [DONE] * 6
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # a study can be moved
    rows = {row.name: row for row in read_rows(tmp_path / "elsewhere", CPU)}
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    one, strong, weak = rows["n1-dp-b8"], rows["n4-dp-b8-strong"], rows["n4-dp-b8-weak"]
    assert (one.step_s, strong.step_s, weak.step_s) == (2.0, 1.0, 2.5)  # first step and saves left out
    assert one.efficiency == {"strong": 1.0, "weak": 1.0}
    assert strong.efficiency == {"strong": pytest.approx(2.0 * 2 / (1.0 * 8))}  # t1 n1 / (tn n)
    assert weak.efficiency == {"weak": pytest.approx(2.0 / 2.5)}  # t1 / tn
    assert (one.mfu, one.memory_bytes) == (pytest.approx(0.35), 7e9 + STEPS - 1)
    assert one.phases_s == {"rollout": 1.0, "update": 0.5, "save_exposed": 3.0}
    assert one.gpu_hours == pytest.approx(2 * (92 + 4 * 5) / 3600)
    assert [reward for _, reward in one.rewards] == [0.0, 0.1, 0.2, 0.3, 0.4] and one.reward == 0.4
    scaling.write(tmp_path / "out", list(rows.values()))
    table = list(csv.DictReader((tmp_path / "out" / "scaling.csv").open()))
    assert [float(row["step_s"]) for row in table] == [row.step_s for row in rows.values()]
    assert {row["layout"] for row in table} == {"dp", "tp2"}
    page = (tmp_path / "out" / "scaling.md").read_text()
    plots = ("efficiency", "tokens", "mfu", "phases", "memory", "reward")
    assert all(f"({name}.png)" in page and (tmp_path / "out" / f"{name}.png").stat().st_size > 5000 for name in plots)
    assert "Not done" not in page


def test_only_what_is_not_done_is_run_again(tmp_path: Path, base: Path) -> None:
    jobs = FakeJobs({"n1-dp-b8": 17, "n1-tp2-b8": 85, "n4-dp-b8-weak": -1})
    states = {state.cell.name: state for state in run_study(tmp_path, base, jobs).states}
    assert len(jobs.started) == 6 and jobs.stopped
    assert (states["n1-dp-b8"].state, states["n1-dp-b8"].reason) == (FAILED, "ended with 17")
    assert (states["n1-tp2-b8"].state, states["n1-tp2-b8"].reason) == (WAITING, "ended with 85")
    assert (states["n4-dp-b8-weak"].state, states["n4-dp-b8-weak"].reason) == (FAILED, "no space on n2")
    scaling.write(tmp_path / "out", read_rows(tmp_path / "out", CPU))
    page = (tmp_path / "out" / "scaling.md").read_text()
    assert "- n1-dp-b8, failed: ended with 17" in page and "- n4-dp-b8-weak, failed: no space on n2" in page
    again = FakeJobs()
    run_study(tmp_path, base, again)
    assert again.started == ["n1-tp2-b8"] and again.retried == []
    last = FakeJobs()
    assert {state.state for state in run_study(tmp_path, base, last, retry_failed=True).states} == {DONE}
    assert last.started == ["n1-dp-b8", "n4-dp-b8-weak"] == last.retried


def test_numbers_of_former_settings_are_not_shown_as_those_of_the_present(tmp_path: Path, base: Path) -> None:
    study = run_study(tmp_path, base, FakeJobs())
    for state in study.states:
        ran = config.load(base, list(state.cell.overrides))
        (state.run_dir / "config.yaml").write_text(config.dump(ran))
    again = FakeJobs()
    run_study(tmp_path, base, again)
    assert again.started == []
    other = grid(tmp_path, base, overrides={"train.steps": STEPS, "optimizer.lr": 1e-5})
    more = cells(read(write_study(tmp_path)), 4, base, tmp_path / "out")
    for found in (other, more):
        with pytest.raises(ValueError, match="cells/n1-dp-b8: this cell is done, with other settings than the study"):
            Study("study", found, base, tmp_path / "out", again, 1, lambda line: None).run(False)
    assert again.started == []


def test_an_interrupted_study_says_what_became_of_its_jobs(tmp_path: Path, base: Path) -> None:
    class Interrupted(FakeJobs):
        at_once, outlive = 1, False

        def alive(self, job: str) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, base, Interrupted({"n1-dp-b8": 85}))
    kept = json.loads((tmp_path / "out" / "cells.json").read_text())["cells"]
    assert [cell["state"] for cell in kept] == [WAITING] * 6 and kept[0]["reason"] == "ended with 85"


def test_a_layout_that_does_not_fit_is_shown_and_the_others_run(tmp_path: Path, base: Path) -> None:
    axes = {
        "layout": {"tp3": {"parallel.tensor_model_parallel_size": 3}, "dp": {"parallel.tensor_model_parallel_size": 1}}
    }
    jobs = FakeJobs()
    found = grid(tmp_path, base, axes=axes, scaling=["strong"], overrides={"train.prompts_per_step": 8})
    said: list[str] = []
    study = Study("study", found, base, tmp_path / "out", jobs, 1, said.append)
    study.run(False)
    assert "n1-tp3 refused: " in said[0] and "n4-tp3 refused: " in said[1]
    refused = [state for state in study.states if state.state == REFUSED]
    assert [state.cell.name for state in refused] == ["n1-tp3", "n4-tp3"] and jobs.started == ["n1-dp", "n4-dp"]
    assert "tensor_model_parallel_size=3 does not divide" in refused[0].reason
    rows = {row.name: row for row in read_rows(tmp_path / "out", CPU)}
    assert rows["n1-tp3"].efficiency == {} and rows["n4-dp"].efficiency["strong"] == pytest.approx(0.5)


def test_a_real_study_of_one_cell(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = {"train.steps": 2 * STEPS, "train.save_every": 1, "parallel.tensor_model_parallel_size": 1}
    facts = {"config": str(base), "nodes": [1], "ranks_per_node": 1, "axes": {}, "scaling": ["strong"]}
    path = write_study(tmp_path, **facts, overrides=overrides)
    out = tmp_path / "out"
    kill_after_a_step(start("scaling", "run", path, "--out", out), out / "cells" / "n1")
    assert main(["scaling", "run", str(path), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(cell["name"], cell["state"]) for cell in document["cells"]] == [("n1", "done")]
    assert "step 1/" not in (out / "cells/n1/logs/attempt_1/rank_0.log").read_text(), "it goes on from its checkpoint"
    assert main(["scaling", "report", str(out), "--gpu", "cpu", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["cells"]
    assert row["steps"] == 2 * STEPS - 1 and row["step_s"] > 0 and row["strong_efficiency"] == 1.0
    assert row["rollout_s"] > 0 and 0.5 < row["memory_bytes"] / row["predicted_memory_bytes"] < 2
    assert row["predicted_step_s"] > 0 and (out / "planned.png").stat().st_size > 5000
    assert main(["scaling", "run", str(path), "--out", str(out)]) == 0
    assert len(list((out / "cells" / "n1" / "logs").glob("attempt_*"))) == 2  # done is done


def kill_after_a_step(study: subprocess.Popen[str], run_dir: Path) -> None:
    """Kill the driver of a study while it waits for a cell, and wait until nothing of the cell runs."""
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes()):
        assert study.poll() is None, study.communicate()
        time.sleep(0.05)
    study.kill()
    study.communicate()
    until = time.monotonic() + 20
    while any(str(run_dir) in command_line(process) for process in psutil.process_iter()):
        assert time.monotonic() < until, "a job has outlived its study"
        time.sleep(0.05)
