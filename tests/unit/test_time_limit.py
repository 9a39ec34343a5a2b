"""When the next step and a save no longer fit, with a clock that the test turns; and how a limit is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_vlmr1 import config
from megatron_vlmr1.runtime import device
from megatron_vlmr1.runtime.time_limit import TimeLimit
from megatron_vlmr1.telemetry.timers import PhaseTimers


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limit(clock: Clock, exit_before_s: float | None, **environ: str) -> TimeLimit:
    return TimeLimit(exit_before_s, environ, clock, started=1000.0)


def test_it_leaves_time_for_a_step_and_a_save():
    clock = Clock()
    timer = limit(clock, 1000.0)
    clock.now += 20
    timer.ready()
    timer.note(step_s=30.0)
    # No save was measured yet: the start took 20 s. 1.2 x (30 + 20) + 5 = 65 s are needed.
    for now, near in ((1934.0, False), (1936.0, True)):
        clock.now = now
        assert timer.is_near() is near
    assert timer.reason == "its time limit, train.exit_before=1000 s"
    timer.note(step_s=10.0, save_s=40.0)  # 1.2 x (30 + 40) + 5 = 89: of the last steps the longest
    for now, near in ((1910.0, False), (1912.0, True)):
        clock.now = now
        assert timer.is_near() is near
    for _ in range(5):
        timer.note(step_s=10.0)  # 1.2 x (10 + 40) + 5 = 65
    clock.now = 1934.0
    assert not timer.is_near()
    timer.note_evaluation(50.0)  # 1.2 x (10 + 40 + 50) + 5 = 125
    assert timer.is_near(evaluates=True) and not timer.is_near(evaluates=False)
    assert timer.reason == ""
    clock.now = 1900.0  # 1.2 x (10 + 40 + 40) + 5 = 113
    assert timer.is_near(saves=True) and not timer.is_near()


@pytest.mark.parametrize(
    ("step", "under_way", "counted"),
    [(5, False, (False, False)), (6, False, (True, False)), (8, False, (False, True)), (9, True, (True, True))],
)
def test_what_comes_before_the_next_step_is_counted(step: int, under_way: bool, counted: tuple[bool, bool]) -> None:
    device.prepare_megatron()
    from megatron_vlmr1.train.run import Run  # imports megatron-core

    asked = []
    cfg = SimpleNamespace(train=SimpleNamespace(evaluate_every=3, save_every=4))
    run: Any = Run.__new__(Run)
    run.cfg, run.step, run._started = cfg, step, 0.0
    run.timers, run.stop = PhaseTimers(), SimpleNamespace(requested=None)
    run.checkpoints = SimpleNamespace(under_way=under_way, save_s=1.0)
    run.limit = SimpleNamespace(note=lambda *args: None, is_near=lambda *args: bool(asked.append(args)))
    assert not run._should_stop()
    assert asked == [counted]


@pytest.mark.parametrize(
    ("exit_before_s", "end", "near_at", "reason"),
    [
        (None, "2000", 1936.0, "the end of the SLURM job"),  # 60 s of margin and 5 to leave
        (300.0, "2000", 1296.0, "train.exit_before=300 s"),
        (3000.0, "2000", 1936.0, "the end of the SLURM job"),
    ],
)
def test_the_earlier_of_the_limit_and_the_end_of_the_slurm_job(exit_before_s, end, near_at, reason):
    clock = Clock()
    timer = limit(clock, exit_before_s, SLURM_JOB_END_TIME=end)
    timer.ready()
    clock.now = near_at - 2
    assert not timer.is_near()
    clock.now = near_at
    assert timer.is_near() and timer.reason.endswith(reason)


def test_no_limit():
    clock = Clock()
    timer = limit(clock, None, SLURM_JOB_END_TIME="unknown")
    clock.now = 1e12
    assert not timer.is_near()


def test_an_attempt_starts_when_its_process_does():
    assert not TimeLimit(3600 * 24 * 365, {}).is_near()
    assert TimeLimit(1e-3, {}).is_near()


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("3:50:00", 13800), ('"3:50:00"', 13800), ("1-00:00:30", 86430), ("90", 90), ("soon", None)],
)
def test_how_a_limit_is_written(tmp_path: Path, written: str, seconds: float | None) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        yaml.safe_dump({"model": {"path": "m"}, "data": {"train": "d"}}) + f"train:\n  exit_before: {written}\n"
    )
    if seconds is None:
        with pytest.raises(ValueError, match="train.exit_before"):
            config.load(file, [])
    else:
        assert config.load(file, []).train.exit_before == seconds
        file.write_text(file.read_text().partition("train:\n")[0])
        assert config.load(file, [f"train.exit_before={written}"]).train.exit_before == seconds
