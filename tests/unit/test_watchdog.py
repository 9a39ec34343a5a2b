"""Who hangs and who waits: on heartbeats written by hand, with clocks that the test turns."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlmr1.runtime import hang, hang_report, heartbeat, stacks, watchdog
from megatron_vlmr1.runtime.heartbeat import Heartbeat
from megatron_vlmr1.runtime.signals import StopFlag
from megatron_vlmr1.runtime.watchdog import Watchdog, beat_s, limit_s
from megatron_vlmr1.telemetry import progress
from megatron_vlmr1.telemetry.timers import PhaseTimers

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def rank(number: int, **fields: object) -> Heartbeat:
    given = {"beat": 10, "step": 3, "phase": "update", "phases": 40, "waits": True, **fields}
    return Heartbeat(number, "host", 100 + number, **given)  # type: ignore[arg-type]


def test_stillness_counts_in_the_observers_own_time():
    still = hang.Stillness(longest_s=2.0)
    assert [still.look("a", now) for now in (0.0, 1.0, 2.5)] == [0.0, 1.0, 2.5]
    assert still.look("a", 1000.0) == 4.5  # the observer itself was away: that proves nothing
    assert still.look("b", 1001.0) == 0.0
    assert still.look("b", 1002.0) == 1.0


@pytest.mark.parametrize(("timeout_s", "limit", "beat"), [(600, 570, 5), (60, 57, 0.6), (8, 7, 0.5), (4, 3.5, 0.5)])
def test_limits_leave_time_to_report_before_the_process_groups_timeout(timeout_s, limit, beat):
    assert (limit_s(timeout_s), beat_s(timeout_s)) == (limit, beat)
    assert limit_s(timeout_s) > 0.8 * timeout_s  # rewards may be waited for that long
    # Seen one beat late at most, answered by all within two and looked at within two.
    assert limit_s(timeout_s) + 5 * beat_s(timeout_s) <= timeout_s + 2


@pytest.mark.parametrize(
    ("records", "mute", "blamed"),
    [
        ([rank(0), rank(1, phase="rollout", phases=38, waits=False)], set(), [1]),
        ([rank(0, step=2), rank(1), rank(2)], set(), [0]),  # a step behind
        ([rank(0), rank(1, waits=False), rank(2)], set(), [1]),  # same place, but not in the collective
        ([rank(0), rank(1), rank(2)], set(), []),  # all in collectives, that they don't share
        ([rank(0), rank(1), rank(2)], {2, 1}, [1, 2]),
        ([rank(0, step=2, waits=False), rank(1)], {1}, [1]),  # who is stopped comes before who is behind
        ([rank(0, waits=False)], set(), [0]),  # alone
        ([rank(0, step=None), rank(1, step=0)], set(), [0]),  # not even started
        ([rank(0, left=True, phases=1), rank(1), rank(2, waits=False)], set(), [2]),
    ],
)
def test_who_is_to_blame(records, mute, blamed):
    assert hang.culprits(records, mute) == blamed


def test_who_is_silent():
    before = [rank(0), rank(1), rank(2), rank(3)]
    after = [rank(0, beat=11), rank(1), rank(2, left=True), rank(3, left=True, error="RuntimeError: no")]
    assert hang.silent(before, after, 5) == {1, 3, 4}  # 4 never wrote


def test_the_verdict_names_rank_host_process_phase_step_and_time():
    said = hang.verdict({1: rank(1, at="train/grpo.py:41 train", still_s=3.0)}, [1], {1: "process state T"}, 7.0)
    assert said == (
        "rank 1 (pid 101 on host) hangs in phase 'update' of step 4, for 7 s: no sign of life (process state T); "
        "last at train/grpo.py:41 train"
    )
    many = hang.verdict({r: rank(r) for r in range(9)}, list(range(5)), {}, 1.0)
    assert many.count("hangs in") == 3 and many.endswith("; and 2 more ranks hang")
    assert hang.verdict({0: rank(0), 1: rank(1)}, [], {}, 5.0).startswith("all 2 ranks wait, none is behind: rank 0")


def test_a_heartbeat_is_overwritten_in_place_and_half_of_one_is_none(tmp_path):
    record = rank(1, at="x" * 5000, error="\ud800 " * 900)
    heartbeat.write(tmp_path, record)
    file = heartbeat.path(tmp_path, 1)
    size, node = file.stat().st_size, file.stat().st_ino
    short = rank(1, beat=11)
    heartbeat.write(tmp_path, short)
    assert (file.stat().st_size, file.stat().st_ino) == (size, node)
    assert heartbeat.read(tmp_path, 1) == short and heartbeat.read_all(tmp_path) == [short]
    file.write_bytes(file.read_bytes()[:100])
    assert heartbeat.read(tmp_path, 1) is None and heartbeat.read(tmp_path, 2) is None
    file.write_text("[1]")
    assert heartbeat.read(tmp_path, 1) is None


def test_timers_tell_where_this_process_is(monkeypatch):
    here = progress.Progress()
    monkeypatch.setattr(progress, "here", here)
    shown: list[str] = []
    here.show = shown.append
    here.begin(4)
    timers = PhaseTimers()
    with timers("update"), timers("logprobs"):
        assert (here.phase, here.phases) == ("logprobs", 2)
    assert (here.phase, here.phases, here.resumed) == ("after update", 4, 4)
    assert shown == ["4:update", "4:logprobs", "4:update", "4:after update"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> progress.Progress:
    fresh = progress.Progress()
    monkeypatch.setattr(progress, "here", fresh)
    return fresh


class Next:
    """A rank that only writes heartbeats."""

    def __init__(self, log_dir: Path, number: int) -> None:
        self.log_dir, self.record = log_dir, rank(number)

    def beat(self) -> None:
        self.record = replace(self.record, beat=self.record.beat + 1)
        heartbeat.write(self.log_dir, self.record)


def watched(tmp_path: Path, here: progress.Progress, turns: int, live: bool, steps: int = 0) -> bool:
    """Let rank 0 of two look `turns` times, half a second apart; whether it finds that something hangs."""
    dog, other = Watchdog(tmp_path, 0, 2, timeout_s=8), Next(tmp_path, 1)
    other.beat()
    here.begin(3)
    found = False
    for turn in range(turns):
        here.marks += 1  # rank 0 itself gets on
        here.step = 3 + steps * turn // turns
        if live:
            other.beat()
        found = dog._hangs(0.5 * turn)
    return found


def test_a_silent_neighbour_is_found_after_the_limit_and_not_before(tmp_path, here):
    assert not watched(tmp_path, here, 14, live=False)  # 6.5 s
    assert watched(tmp_path, here, 16, live=False)  # 7.5 s
    assert not watched(tmp_path, here, 99, live=True)


def test_a_neighbour_that_cannot_write_but_takes_part_in_steps_lives(tmp_path, here):
    assert not watched(tmp_path, here, 40, live=False, steps=20)
    assert watched(tmp_path, here, 40, live=False, steps=1)  # the step that it was stopped in may still end


def test_who_cannot_write_itself_accuses_nobody(tmp_path, here, monkeypatch, caplog):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeat, "write", full)
    dog = Watchdog(tmp_path, 0, 2, timeout_s=8)
    for turn in range(40):
        here.marks += 1
        assert not dog._hangs(0.5 * turn)
    assert caplog.text.count("cannot be written") == 1


def test_progress_of_any_kind_keeps_it_quiet_and_none_does_not(tmp_path, here):
    dog = Watchdog(tmp_path, 0, 1, timeout_s=8)
    timers = PhaseTimers()
    now = 0.0
    for turn in range(40):  # a phase may take as long as it likes
        now += 0.5
        if turn % 10 == 0:
            progress.mark()
        elif turn % 10 == 5:
            with timers("data"):
                pass
        assert not dog._hangs(now)
    # The last progress was seen at turn 35, four looks ago; the limit is 7 s.
    assert next(turn for turn in range(1, 40) if dog._hangs(now + 0.5 * turn)) == 10


def test_a_rank_alone_that_is_stuck_is_reported_and_ended(tmp_path, here):
    codes: list[int] = []
    left = threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    here.begin(2)
    with Watchdog(tmp_path, 0, 1, timeout_s=1, leave=leave), PhaseTimers()("rollout"):
        assert left.wait(60)
    assert codes == [70]
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (70, 2)
    assert "rank 0" in outcome["reason"] and "hangs in phase 'rollout' of step 3" in outcome["reason"]
    assert "test_a_rank_alone_that_is_stuck" in (tmp_path / "hang/rank_0.txt").read_text()
    assert json.loads((tmp_path / "hang/report.json").read_text())["blamed"] == [0]
    last = heartbeat.read(tmp_path, 0)
    assert last is not None and last.left and not last.error


def test_a_stuck_rank_ends_though_its_report_fails(tmp_path, here, monkeypatch):
    left = threading.Event()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")  # as printing to a log on a full disk does

    monkeypatch.setattr(hang_report, "report", full)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with Watchdog(tmp_path, 0, 1, timeout_s=1, leave=lambda code: left.set()):
        assert left.wait(60)


def test_the_outcome_is_there_when_the_others_leave_and_though_the_log_is_full(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    there: list[bool] = []
    write = hang_report.write_atomic

    def written(path: Path, data: bytes) -> None:
        there.append((tmp_path / "outcome.json").exists())
        write(path, data)

    monkeypatch.setattr(hang_report, "write_atomic", written)
    monkeypatch.setattr(sys, "stderr", Full())
    heartbeat.write(tmp_path, rank(0))
    with pytest.raises(OSError, match="No space left"):
        hang_report.report(tmp_path, rank(0), 1, 0.5, 7.0)
    assert there == [True] and (tmp_path / "hang/report.json").exists()


def test_a_file_system_that_fails_says_nothing_of_a_hang(tmp_path, monkeypatch):
    def stale(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    assert not hang_report.is_begun(tmp_path)


def test_the_heartbeat_tells_of_a_signal(tmp_path, here):
    with StopFlag(), Watchdog(tmp_path, 0, 1, timeout_s=60):
        signal.raise_signal(signal.SIGUSR1)
    last = heartbeat.read(tmp_path, 0)
    assert last is not None and last.asked == "SIGUSR1"


def test_the_last_heartbeat_has_the_exception(tmp_path, here):
    with pytest.raises(KeyError), Watchdog(tmp_path, 0, 1, timeout_s=60):
        raise KeyError("lost")
    last = heartbeat.read(tmp_path, 0)
    assert last is not None and (last.left, last.error) == (True, "KeyError: 'lost'")


def test_ranks_report_together_and_one_looks_at_the_silent_one(tmp_path, capfd):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    me = os.uname().nodename
    live = [replace(rank(r, phase="rollout"), host=me, pid=os.getpid()) for r in (0, 1)]
    lost = replace(rank(2, phase="data"), host=me, pid=sleeper.pid)
    away = replace(rank(3), host="elsewhere", pid=1)  # on a host where nobody lives
    try:
        for record in (*live, lost, away):
            heartbeat.write(tmp_path, record)
        others = threading.Thread(target=hang_report.report, args=(tmp_path, live[1], 4, 0.5, 7.0))
        leader = threading.Thread(target=hang_report.report, args=(tmp_path, live[0], 4, 0.5, 7.0))
        leader.start()
        while not hang_report.is_begun(tmp_path):
            time.sleep(0.01)
        others.start()
        leader.join(30)
        others.join(30)
    finally:
        sleeper.kill()
        sleeper.wait()
    told = json.loads((tmp_path / "hang/report.json").read_text())
    assert (told["blamed"], told["mute"]) == ([2, 3], [2, 3])
    assert f"rank 2 (pid {sleeper.pid} on {me}) hangs in phase 'data' of step 4, for 7 s" in told["reason"]
    assert "process state S (sleeping)" in told["reason"] and "none of its host answers" in told["reason"]
    said = capfd.readouterr().err
    assert "vlmr1: error: the job hangs: rank 2" in said and "vlmr1: rank 1 ends because the job hangs: rank 2" in said
    assert "process state S (sleeping)" in (tmp_path / "hang/rank_2.txt").read_text()


@pytest.mark.parametrize(
    ("name", "one_word", "read"),
    [
        ("12:reward_exposed", "12:reward_expos", (12, "reward_exposed")),
        ("3:after step", "3:after-step", (3, "after step")),
    ],
)
def test_a_name_that_other_processes_see(name: str, one_word: str, read: tuple[int, str]) -> None:
    ready = f"import sys, time; from megatron_vlmr1.runtime import stacks; stacks.show({name!r}); "
    child = subprocess.Popen(
        [sys.executable, "-c", ready + 'print("ready", flush=True); time.sleep(600)'], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        text = stacks.of_other(child.pid)
    finally:
        child.kill()
        child.wait()
    assert f"name {one_word}\n" in text and stacks.shown(text)[:2] == read
    assert stacks.of_other(child.pid) == "the process is gone\n"
    spied = 'name -:start\nThread 1 (idle): "MainThread"\n    wait (threading.py:3)\n    go (megatron_vlmr1/a.py:4)\n'
    assert stacks.shown(spied) == (None, "start", "megatron_vlmr1/a.py:4 go")


def test_the_innermost_line_that_is_no_librarys_and_whether_it_waits():
    at, waits = stacks.place(sys._getframe())
    assert at.startswith("unit/test_watchdog.py:") and at.endswith("whether_it_waits") and not waits
    namespace: dict[str, object] = {"look": stacks.place, "sys": sys}
    exec(compile("def f():\n    return look(sys._getframe())", "/x/torch/distributed/c10d.py", "exec"), namespace)
    assert namespace["f"]()[1] is True  # type: ignore[operator]
    assert watchdog.SAMPLE_S < beat_s(1)
