"""A run with all of its telemetry, read back from outside; it trains the same as one without."""

from __future__ import annotations

import gzip
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1.report.page import build
from megatron_vlmr1.telemetry.metrics import read_metrics
from megatron_vlmr1.telemetry.timers import PHASES
from tests import jobs

TRACED, PROFILED = 2, 1


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> tuple[Path, str]:
    """The run's directory, and what its endpoint served after the second step."""
    folder = tmp_path_factory.mktemp("watched")
    settings = {"sample_s": 0.05, "prometheus_port": 0, "trace_steps": [TRACED, 99]}
    settings |= {"profile_steps": [PROFILED], "profile_ranks": [1]}
    process = jobs.start("train", jobs.write_config(folder, shards, telemetry=settings), "--nproc", 2)
    output = jobs.wait_for(process, "step 2/4")
    port = re.search(r"http://127\.0\.0\.1:(\d+)/metrics", output)[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        page = answer.read().decode()
    code, rest = jobs.finish(process)
    assert code == 0, output + rest
    return folder / "run", page


def test_it_trains_the_same(watched: tuple[Path, str], whole: Path) -> None:
    assert jobs.checkpoint_hashes(watched[0], 4) == jobs.checkpoint_hashes(whole, 4)


def test_the_endpoint_served_the_step_s_metrics(watched: tuple[Path, str]) -> None:
    run, page = watched
    served = dict(re.findall(r'metric="([^"]+)",run="run"\} (\S+)', page))
    rows = dict(read_metrics(run))
    step = int(float(served.pop("step")))
    assert step in (1, 2) and float(served.pop("unix_s")) > 0
    assert {name: float(value) for name, value in served.items()} == {
        name: value for name, value in rows[step].items() if name != "unix_s"
    }


def own_seconds(spans: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each phase without the phases within it."""
    own: dict[str, float] = {}
    for span in spans:
        end = span["ts"] + span["dur"]
        inside = [s for s in spans if s is not span and span["ts"] <= s["ts"] and s["ts"] + s["dur"] <= end]
        assert all("ts" in s for s in inside)
        own[span["name"]] = own.get(span["name"], 0.0) + (span["dur"] - sum(s["dur"] for s in inside)) / 1e6
    return own


def test_the_trace_has_every_rank_s_phases_and_adds_up_to_the_timers(watched: tuple[Path, str]) -> None:
    run, _ = watched
    assert [path.name for path in (run / "traces").iterdir()] == [f"step_{TRACED}.json"]
    events = json.loads((run / f"traces/step_{TRACED}.json").read_bytes())["traceEvents"]
    row = dict(read_metrics(run))[TRACED]
    timed = {name.removeprefix("time/"): seconds for name, seconds in row.items() if name.startswith("time/")}
    tracks = [[e for e in events if e["ph"] == "X" and e["tid"] == rank] for rank in (0, 1)]
    assert own_seconds(tracks[0]) == pytest.approx(timed, abs=1e-5)
    for track in tracks:
        assert {"data", "rollout", "reward_exposed", "update", "logprobs"} <= {e["name"] for e in track} <= set(PHASES)
        (update,) = [e for e in track if e["name"] == "update"]
        (inner,) = [e for e in track if e["name"] == "logprobs"]
        assert update["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= update["ts"] + update["dur"]
    rollouts = [next(e for e in track if e["name"] == "rollout") for track in tracks]
    assert abs(rollouts[0]["ts"] - rollouts[1]["ts"]) < 1e6 * row["perf/step_s"]  # one clock
    assert {"host cpu_util", "host rss_bytes"} <= {e["name"] for e in events if e["ph"] == "C"}


def test_the_profile_is_the_asked_rank_s_and_step_s(watched: tuple[Path, str]) -> None:
    run, _ = watched
    (path,) = (run / "profiles").iterdir()
    assert path.name == f"rank_1_step_{PROFILED}.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"aten::mm", "aten::embedding"} & names


def test_samples_join_the_phases(watched: tuple[Path, str]) -> None:
    run, _ = watched
    (path,) = (run / "telemetry").glob("node_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ends = {step: row["unix_s"] for step, row in read_metrics(run)}
    inside = [row for row in rows if row["step"] in range(1, 4) and row["phase"] in ("rollout", "update")]
    assert len(inside) >= 4
    for row in inside:
        assert ends[row["step"] - 1] - 0.5 <= row["unix_s"] <= ends[row["step"]] + 0.5
    assert all(row["host"]["rss_bytes"] > 1e8 for row in inside)  # of both ranks
    assert all("host/cpu_util" in row for _, row in read_metrics(run))


def test_the_report_draws_them(watched: tuple[Path, str]) -> None:
    page = build(watched[0]).read_text()
    assert "The machines" in page and "CPU" in page
