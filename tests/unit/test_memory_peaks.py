"""Peaks by phase and what was planned for them; settings of offloading that mean something."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import read_plan_shape
from megatron_vlmr1.report import facts
from megatron_vlmr1.report.run import load_run
from megatron_vlmr1.telemetry.timers import PhaseTimers
from megatron_vlmr1.train import peaks

GB = 10**9


def settings(**sections):
    raw = {"model": {"path": "-"}, "data": {"train": "-"}, **sections}
    return config.parse(raw, "test")


class Memory:
    """A device whose memory a test decides on."""

    def __init__(self) -> None:
        self.most = self.now = 0

    def use(self, size: int) -> None:
        self.now = size
        self.most = max(self.most, size)

    def peak_bytes(self) -> int:
        most, self.most = self.most, self.now
        return most


def test_a_peak_is_the_innermost_phases() -> None:
    memory = Memory()
    timers = PhaseTimers(peak_bytes=memory.peak_bytes)
    memory.use(99)
    memory.use(10)
    with timers("update"):
        memory.use(40)
        memory.use(20)
        with timers("logprobs"):
            memory.use(70)
            memory.use(15)
        memory.use(30)
    memory.use(90)
    memory.use(0)
    with timers("rollout"):
        memory.use(5)
    assert timers.take_peaks() == {"update": 40, "logprobs": 70, "rollout": 5}
    assert timers.take_peaks() == {}
    assert "memory/peak_update_bytes" not in timers.take()


def test_nothing_is_said_where_nothing_is_counted() -> None:
    assert peaks.Peaks(settings(), Path("/nowhere"), 1, PhaseTimers()).take() == {}


def test_the_plan_stands_beside_the_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    directory, cfg = hf_directory("asset:tiny_vlm"), settings()
    monkeypatch.setattr(peaks.reduce, "maxima", lambda values, speaks: {k: 2.0 * v for k, v in values.items()})
    memory = Memory()
    timers = PhaseTimers(peak_bytes=memory.peak_bytes)
    both = peaks.Peaks(cfg, directory, 1, timers)
    with timers("update"):
        memory.use(21)
    found = both.take()
    (planned,) = rank_memory(cfg, read_plan_shape(directory), 1)
    assert found.pop("memory/peak_update_bytes") == 42.0
    assert found == {
        f"memory/plan_{name}_bytes": planned.peak(phase) - planned.phases[phase]["runtime"]
        for name, phase in (("rollout",) * 2, ("logprobs",) * 2, ("update",) * 2, ("save_exposed", "save"))
    }


def test_the_report_shows_both(tmp_path: Path) -> None:
    rows = [
        {"step": step, "memory/peak_rollout_bytes": size * GB, "memory/plan_rollout_bytes": 9 * GB, **more}
        for step, size, more in ((0, 3, {}), (1, 8, {"memory/peak_data_bytes": GB}), (2, 4, {}))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(tmp_path)
    line = ("peak memory of a GPU", "data 1.00 GB, rollout 8.00 GB (planned at most 9.00)")
    assert facts.peak_memory(run) == [line]
    assert line in facts.setup(run)
    assert facts.peak_memory(SimpleNamespace(metrics=[(0, {"train/loss": 1.0})])) == []


def test_offloading_in_rollout_needs_one() -> None:
    assert settings(method="sft", optimizer={"offload": "always"}).optimizer.offload == "always"
    assert settings(method="sft", optimizer={"offload": "rollout"}, train={"evaluate_every": 5})
    with pytest.raises(ValueError, match="optimizer.offload=rollout changes nothing: method=sft"):
        settings(method="sft", optimizer={"offload": "rollout"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_takes_away_what_is_offloaded(precision: str) -> None:
    shape = read_plan_shape(hf_directory("asset:tiny_vlm"))
    none, rollout, always = (
        rank_memory(settings(precision=precision, optimizer={"offload": when}), shape, 2)[0]
        for when in ("none", "rollout", "always")
    )
    state = none.phases["save"]["optimizer"]
    away = state + none.phases["save"]["gradients"]
    for offloaded in (rollout, always):
        assert offloaded.host["offloaded optimizer"] == state and "offloaded optimizer" not in none.host
        for phase in ("rollout", "logprobs"):
            assert none.peak(phase) - offloaded.peak(phase) == away
        assert offloaded.peak("save") == none.peak("save")
    assert rollout.peak("update") == none.peak("update")
    assert none.peak("update") - state <= always.peak("update") < none.peak("update")
