"""metrics.jsonl, TensorBoard, samples, timers, console line."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys

import pytest

from megatron_vlmr1.telemetry.console import console_line, duration, print_line
from megatron_vlmr1.telemetry.metrics import MetricsWriter, read_metrics
from megatron_vlmr1.telemetry.samples import write_samples
from megatron_vlmr1.telemetry.timers import PhaseTimers
from tests.events import tensorboard_points


def steps_of(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_strict_json_and_read_back(tmp_path):
    writer = MetricsWriter(tmp_path / "new" / "run")
    writer.write(0, {"reward/mean": 1.25, "grpo/kl": math.nan, "a": math.inf, "b": -math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = (tmp_path / "new/run/metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=refuse)
    assert row["step"] == 0 and row["reward/mean"] == 1.25 and row["grpo/kl"] == "NaN"
    [(step, values)] = read_metrics(tmp_path / "new/run")
    assert step == 0 and math.isnan(values["grpo/kl"]) and values["a"] == math.inf and values["b"] == -math.inf


def test_a_resumed_run_has_each_step_once(tmp_path):
    first = MetricsWriter(tmp_path)
    for step in range(5):
        first.write(step, {"x": step})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":5,"x":')  # killed in the middle of a line
    resumed = MetricsWriter(tmp_path)
    resumed.truncate_after(3)
    for step in range(3, 6):
        resumed.write(step, {"x": 10 + step})
    resumed.close()
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4, 5]
    expected = [(0, 0), (1, 1), (2, 2), (3, 13), (4, 14), (5, 15)]
    assert [(step, values["x"]) for step, values in read_metrics(tmp_path)] == expected
    assert tensorboard_points(tmp_path, "x") == expected


def test_a_torn_tail_costs_only_itself(tmp_path):
    MetricsWriter(tmp_path).write(0, {"x": 1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":1,"x"')
    MetricsWriter(tmp_path).write(2, {"x": 3})
    assert [(step, values["x"]) for step, values in read_metrics(tmp_path)] == [(0, 1.0), (2, 3.0)]


def test_hostile_lines_are_left_out(tmp_path):
    lines = ["[]", '{"step":"1"}', "[" * 100_000, '{"step":1,"x":"abc","y":[1],"z":2,"big":1' + "0" * 400 + "}", "\xff"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [(1, {"z": 2.0})]
    assert read_metrics(tmp_path / "absent") == []


def test_without_tensorboard_the_lines_are_still_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"x": 1.0})
    writer.write(1, {"x": 1.0})
    assert steps_of(tmp_path) == [0, 1]
    assert len(caplog.records) == 1


def test_samples_are_whole_and_strict(tmp_path):
    completion = {"text": "<think>\ud800", "value": 1.5, "parts": {"iou": 0.5}, "failure": None, "advantage": math.nan}
    path = write_samples(tmp_path, 7, [{"key": "a", "question": "é", "truth": "[1]", "completions": [completion]}])
    assert path == tmp_path / "samples" / "step_7.jsonl"
    [row] = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert row["completions"][0] == completion | {"advantage": "NaN"}
    assert os.listdir(path.parent) == ["step_7.jsonl"]


def test_samples_that_cannot_be_written_only_warn(tmp_path, caplog):
    (tmp_path / "samples").write_text("in the way")
    assert write_samples(tmp_path, 0, []) is None
    assert len(caplog.records) == 1


def test_phases_add_up_when_nested():
    now, synced = [0.0], []
    timers = PhaseTimers(synchronize=lambda: synced.append(now[0]), clock=lambda: now[0])

    def work(seconds):
        now[0] += seconds

    with timers("rollout"):
        work(2)
        with timers("reward_exposed"):
            work(3)
        work(4)
    work(10)
    with timers("rollout"):
        work(1)
    with pytest.raises(KeyError), timers("update"):
        work(5)
        raise KeyError
    assert timers.take() == {"time/rollout": 7.0, "time/reward_exposed": 3.0, "time/update": 5.0}
    assert timers.take() == {}
    assert len(synced) == 8


def test_console_line(capsys):
    metrics = {"reward/mean": 1.2345, "reward/format": 0.5, "grpo/kl": 0.00123, "train/grad_norm": math.nan}
    line = console_line(9, 160, metrics | {"rollout/length_mean": 26.04, "perf/step_s": 0.5})
    assert line == "step  10/160  reward 1.234  format 0.50  kl 0.0012  length 26.0  grad nan  time 0.50s  left 1m15s"
    print_line(9, 160, {})
    captured = capsys.readouterr()
    assert captured.err == "step  10/160\n" and captured.out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (3725, "1h02m"), (90000, "1d01h"), (math.inf, "?")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stderr", Gone())
    print_line(0, 2, {"train/loss": 1.0})
