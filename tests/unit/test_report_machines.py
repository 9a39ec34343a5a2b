"""The page's strip of nodes, from files as the sampler writes them and as a crash leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_vlmr1.report.machines import _phase_spans, machines
from megatron_vlmr1.report.page import build
from megatron_vlmr1.telemetry.metrics import MetricsWriter

GPU = {"util": 90, "power_w": 600.0, "mem_bytes": 6e10}


def write(run: Path, node: str, rows: list[object]) -> None:
    (run / "telemetry").mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (run / f"telemetry/node_{node}.jsonl").write_text("\n".join(lines))


def samples(count: int, gpus: list[dict[str, object]]) -> list[object]:
    host = {"cpu_util": 50.0, "rss_bytes": 1e9}
    phases = ["rollout", "rollout", "update", "after update"]
    return [{"unix_s": 100.0 + i, "step": i, "phase": phases[i % 4], "gpus": gpus, "host": host} for i in range(count)]


def test_gpus_where_there_are_some_else_the_host(tmp_path: Path) -> None:
    write(tmp_path, "a", samples(40, [GPU, {"lost": 1}]))
    write(tmp_path, "b", samples(40, []))
    (first, second), count = machines(tmp_path)
    assert count == 2 and (first.name, second.name) == ("a", "b")
    assert [title.split(",")[0] for title, _ in first.charts] == ["GPU utilisation", "GPU power", "GPU memory"]
    assert [title.split(",")[0] for title, _ in second.charts] == ["CPU utilisation", "Memory of our processes"]
    assert [phase for _, phase in first.phases] == ["rollout", "update"]
    assert all(svg.startswith("<svg") for _, svg in first.charts)


def test_phases_end_where_nobody_ran() -> None:
    seconds = np.array([0.0, 1, 2, 3, 4, 1000, 1001, 1002])
    phases = ["data", "update", "update", "after update", "update", "update", "update", "save_exposed"]
    assert _phase_spans(seconds, phases) == [
        (0.0, 1.0, "data"),
        (1.0, 3.0, "update"),
        (4.0, 4.0, "update"),
        (1000.0, 1002.0, "update"),
        (1002.0, 1002.0, "save_exposed"),
    ]


def test_torn_and_strange_lines_are_left_out(tmp_path: Path) -> None:
    strange: list[object] = [
        "[1]",
        '{"unix_s": "NaN"}',
        '{"unix_s": 200, "gpus": 3, "host": null',
        "{}",
        '{"unix_s": 9, "gpus": 3}',
    ]
    write(tmp_path, "a", [*samples(5, [GPU]), *strange, {"unix_s": 1e5, "gpus": [{"util": "x"}], "phase": None}])
    (machine,), _ = machines(tmp_path)
    assert len(machine.charts) == 3
    write(tmp_path, "a", strange[:-1])
    assert machines(tmp_path) == ([], 1)
    assert machines(tmp_path / "absent") == ([], 0)


def test_a_long_run_is_thinned_and_names_are_escaped(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).write(0, {"x": 1.0})
    assert "The machines" not in build(tmp_path).read_text()
    for name in ("<b>", "c", "d", "e", "f"):
        write(tmp_path, name, samples(8000, [GPU]))
    page = build(tmp_path).read_text()
    assert "4 of 5 nodes" in page and "&lt;b&gt;" in page and "<b></h3>" not in page
    assert len(page) < 1_500_000
