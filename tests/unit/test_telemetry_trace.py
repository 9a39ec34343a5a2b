"""A step as a trace, read back; and the settings that ask for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlmr1.config.telemetry import LaunchConfig, TelemetryConfig
from megatron_vlmr1.telemetry.timers import PhaseTimers
from megatron_vlmr1.telemetry.trace import Track, write_trace

SAMPLE = {"unix_s": 1001.0, "gpus": [{"util": 40.0}, {"lost": 1}], "host": {"cpu_util": 5.0, "rss_bytes": 7.0}}


def test_ranks_on_one_clock_with_counters(tmp_path: Path) -> None:
    spans = [("logprobs", 1002.0, 1003.0), ("update", 1001.5, 1004.0)]
    late = [(name, begin + 60, end + 60) for name, begin, end in spans]  # a clock that is a minute ahead
    tracks = [Track(0, "n1", spans, [SAMPLE]), Track(1, "n2", late, [{**SAMPLE, "unix_s": 1061.0}], ahead_s=60.0)]
    assert write_trace(tmp_path, 3, tracks)
    found = json.loads((tmp_path / "traces/step_3.json").read_bytes())
    events = found["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert names == {(0, 0): "rank 0", (1, 1): "rank 1"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["node n1", "node n2"]
    for rank in (0, 1):
        phases = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == rank]
        assert phases == [("update", 0.0, 2.5e6), ("logprobs", 0.5e6, 1e6)]
        counters = {e["name"]: (e["ts"], e["args"]["value"]) for e in events if e["ph"] == "C" and e["pid"] == rank}
        at = -0.5e6
        assert counters == {"host cpu_util": (at, 5), "host rss_bytes": (at, 7), "gpu 0 util": (at, 40)}
    assert found["otherData"] == {"step": 3, "unix_s": 1001.5, "clock_ahead_s": {"0": 0.0, "1": 60.0}}


def test_a_trace_that_cannot_be_written_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "traces").write_text("in the way")
    assert not write_trace(tmp_path, 0, [Track(0, "n", [])])
    assert len(caplog.records) == 1


def test_spans_of_nested_phases() -> None:
    clock = iter([1.0, 2.0, 5.0, 9.0, 9.5])
    timers = PhaseTimers(clock=lambda: next(clock))
    with timers("update"), timers("logprobs"):
        pass
    taken = timers.take()
    assert timers.spans == [("logprobs", 2.0, 5.0), ("update", 1.0, 9.0)]
    assert taken == {"time/logprobs": 3.0, "time/update": 5.0}
    begins = [begin for _, begin, _ in timers.wall_spans()]
    assert begins[0] - begins[1] == pytest.approx(1.0) and begins[0] > 1e9


def test_settings() -> None:
    assert LaunchConfig().preflight == "quick"
    assert LaunchConfig.model_validate({"preflight": False}).preflight == "off"  # as YAML reads a bare `off`
    defaults = TelemetryConfig()
    assert (defaults.sample_s, defaults.prometheus_port, defaults.prometheus_host) == (5.0, None, "127.0.0.1")
    assert (defaults.trace_steps, defaults.profile_steps, defaults.profile_ranks) == ([], [], [0])
    for bad in ({"prometheus_port": 70000}, {"sample_s": -1}, {"trace_steps": [-1]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TelemetryConfig.model_validate(bad)
