"""The local launcher, with small stand-ins for ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_vlmr1.launch.local import INSIST_S, new_attempt, run_ranks
from megatron_vlmr1.runtime.signals import StopFlag


def python(code: str) -> list[str]:
    return [sys.executable, "-c", "import json, os, signal, subprocess, sys, time\n" + textwrap.dedent(code)]


def wait_until(condition, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_environment_of_the_ranks(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = 'open(f"{sys.argv[1]}/{os.environ[\'RANK\']}", "w").write(json.dumps(dict(os.environ)))'
    assert run_ranks(3, [*python(code), str(tmp_path)], tmp_path / "logs", {"EXTRA": "x"}) == 0
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [env["LOCAL_RANK"] for env in seen] == ["0", "1", "2"]
    share = max(1, len(os.sched_getaffinity(0)) // 3)
    for env in seen:
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["EXTRA"]) == ("3", "3", "x")
        assert env["OMP_NUM_THREADS"] == str(share)
        assert env["VLMR1_LOG_DIR"] == str(tmp_path / "logs")
        assert env["MASTER_ADDR"] == "127.0.0.1"
    assert len({env["MASTER_PORT"] for env in seen}) == 1
    assert len({env["VLMR1_INIT_METHOD"] for env in seen}) == 1
    meeting_place = Path(seen[0]["VLMR1_INIT_METHOD"].removeprefix("file://")).parent
    assert not meeting_place.exists()


def test_omp_num_threads_of_the_user_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_ranks(2, python('sys.exit(os.environ["OMP_NUM_THREADS"] != "7")'), tmp_path) == 0


def test_output_of_rank_0_reaches_the_terminal_and_all_of_it_the_logs(tmp_path, capfd):
    code = """
    sys.stdout.write(f"out of {os.environ['RANK']}\\n")  # in one piece, unbuffered or not
    sys.stderr.write(f"err of {os.environ['RANK']}\\n")
    """
    assert run_ranks(2, python(code), tmp_path) == 0
    terminal = capfd.readouterr()
    assert (terminal.out, terminal.err) == ("out of 0\n", "err of 0\n")
    for rank in range(2):
        lines = (tmp_path / f"rank_{rank}.log").read_text().splitlines()
        assert sorted(lines) == [f"err of {rank}", f"out of {rank}"]


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("sys.exit(9)", 9, "rank 1 (pid {pid}) left with exit code 9"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1 (pid {pid}) was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "rank 1 (pid {pid}) was killed by SIGSEGV"),
    ],
)
def test_the_first_failing_rank_is_named_and_the_others_end(tmp_path, capfd, end, code, words):
    program = f"""
    open(f"{tmp_path}/pid{{os.environ['RANK']}}", "w").write(str(os.getpid()))
    if os.environ["RANK"] == "1":
        {end}
    time.sleep(60)
    """
    started = time.monotonic()
    assert run_ranks(3, python(program), tmp_path / "logs") == code
    assert time.monotonic() - started < 3
    pid = (tmp_path / "pid1").read_text()
    assert capfd.readouterr().err == f"vlmr1: {words.format(pid=pid)}; its log: {tmp_path}/logs/rank_1.log\n"


def test_the_order_of_ends_decides_not_the_rank(tmp_path, capfd):
    # The victim's end makes the neighbour fail 30 ms later, as gloo does.
    program = f"""
    rank = os.environ["RANK"]
    if rank == "2":
        open("{tmp_path}/dead", "w")
        os.kill(os.getpid(), signal.SIGKILL)
    while not os.path.exists("{tmp_path}/dead"):
        time.sleep(0.001)
    time.sleep(0.03)
    sys.exit(1)
    """
    for attempt in range(5):
        assert run_ranks(3, python(program), tmp_path / f"logs{attempt}") == 137
        assert "rank 2" in capfd.readouterr().err
        (tmp_path / "dead").unlink()


def test_deaf_ranks_and_their_grandchildren_are_killed(tmp_path):
    # Both ignore SIGTERM; the grandchild has even left the process group.
    program = f"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ["RANK"] == "0":
        child = subprocess.Popen([sys.executable, "-c",
            "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setpgid(0, 0); "
            "open('{tmp_path}/ready', 'w'); time.sleep(60)"])
        open("{tmp_path}/pids", "w").write(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(60)
    while not os.path.exists("{tmp_path}/ready"):
        time.sleep(0.01)
    sys.exit(7)
    """
    started = time.monotonic()
    assert run_ranks(2, python(program), tmp_path / "logs") == 7
    assert time.monotonic() - started < 8
    assert not any(running(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_what_a_killed_rank_leaves_behind_is_killed(tmp_path):
    program = f"""
    if os.environ["RANK"] == "1":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open("{tmp_path}/pid", "w").write(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    assert run_ranks(2, python(program), tmp_path / "logs") == 137
    assert not running(int((tmp_path / "pid").read_text()))


def test_the_ranks_die_with_a_killed_launcher(tmp_path):
    rank = f"""
    open(f"{tmp_path}/{{os.environ['RANK']}}", "w").write(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
    """
    launcher = subprocess.Popen(
        python(
            "from megatron_vlmr1.launch.local import run_ranks\n"
            f"sys.exit(run_ranks(2, {python(rank)!r}, {str(tmp_path / 'logs')!r}))"
        ),
        env={**os.environ, "TMPDIR": str(tmp_path)},  # a killed launcher can't remove its temporary directory
    )
    files = [tmp_path / "0", tmp_path / "1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(running(pid) for pid in pids)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(running(pid) for pid in pids), 2)


def test_a_child_whose_parent_is_already_gone_ends():
    code = "from megatron_vlmr1.runtime.children import die_with_parent; die_with_parent({}); print('alive')"
    for parent, status, said in ((os.getpid(), 0, "alive\n"), (1 << 22, 137, "")):
        done = subprocess.run(python(code.format(parent)), stdout=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stdout) == (status, said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_and_the_outcome_file_decides(tmp_path, capfd, number):
    program = f"""
    from megatron_vlmr1.runtime.signals import StopFlag
    count = []
    stop = StopFlag()
    inner = signal.getsignal(signal.{number.name})
    signal.signal(signal.{number.name}, lambda *a: (count.append(1), inner(*a)))
    open(f"{tmp_path}/ready{{os.environ['RANK']}}", "w")
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.3)
    print(stop.requested, len(count))
    if os.environ["RANK"] == "0":
        outcome = dict(reason=stop.requested, code=85, step=4)
        json.dump(outcome, open(os.environ["VLMR1_LOG_DIR"] + "/outcome.json", "w"))
    sys.exit(85)
    """

    def knock() -> None:
        wait_until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
        for _ in range(3):
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    thread = threading.Thread(target=knock)
    thread.start()
    former = signal.getsignal(number)
    assert run_ranks(2, python(program), tmp_path / "logs") == 85
    thread.join()
    assert signal.getsignal(number) is former
    for rank in range(2):
        assert f"{number.name} 1\n" in (tmp_path / "logs" / f"rank_{rank}.log").read_text()
    said = capfd.readouterr().err
    assert said == f"vlmr1: {number.name}: asked the ranks to stop and save; a second Ctrl-C kills them\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_deaf_ranks(tmp_path, capfd, number):
    program = f"""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    open(f"{tmp_path}/ready{{os.environ['RANK']}}", "w")
    time.sleep(60)
    """
    times = []

    def knock() -> None:
        wait_until(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
        for each, pause in ((signal.SIGUSR1, 0.1), (number, INSIST_S / 2), (number, INSIST_S), (number, 0)):
            times.append(time.monotonic())
            os.kill(os.getpid(), each)
            time.sleep(pause)

    thread = threading.Thread(target=knock)
    thread.start()
    assert run_ranks(2, python(program), tmp_path / "logs") == 128 + number
    thread.join()
    assert 0 <= time.monotonic() - times[-1] < 2  # not of the one that came too soon after the first
    said = capfd.readouterr().err
    assert said.endswith(f"vlmr1: {number.name} again: killed the ranks\n") and said.count("\n") == 2


def test_ranks_that_leave_in_order_have_time_for_it(tmp_path, capfd):
    # Rank 0 is still closing its files when rank 1 has gone with 85; a crash would have brought SIGTERM at once.
    program = """
    if os.environ["RANK"] == "1":
        sys.exit(85)
    time.sleep(1)
    print("closed")
    sys.exit(85)
    """
    assert run_ranks(2, python(program), tmp_path) == 85
    assert capfd.readouterr().out == "closed\n"


def test_an_outcome_of_an_earlier_job_or_a_broken_one_does_not_count(tmp_path, capfd):
    (tmp_path / "outcome.json").write_text('{"reason": "old", "code": 85, "step": 1}')
    assert run_ranks(1, python("sys.exit(3)"), tmp_path) == 3
    write = 'open(os.environ["VLMR1_LOG_DIR"] + "/outcome.json", "w").write("{"); sys.exit(4)'
    assert run_ranks(1, python(write), tmp_path) == 4
    assert "outcome.json is not readable" in capfd.readouterr().err


@pytest.mark.parametrize("guilty", [(0, 1), (1,)])
def test_wrong_input_is_explained_in_one_line(tmp_path, capfd, guilty):
    program = f"""
    if int(os.environ["RANK"]) in {guilty!r}:
        print("vlmr1: error: row 3 of a.jsonl has no image", file=sys.stderr)
        sys.exit(2)
    time.sleep(0.5)
    """
    assert run_ranks(2, python(program), tmp_path) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "row 3 of a.jsonl has no image" in said


def test_output_without_a_reader_does_not_stop_the_ranks(tmp_path):
    rank = """
    for _ in range(2000):
        print("x" * 99)
    """
    code = (
        "from megatron_vlmr1.launch.local import run_ranks\n"
        f"code = run_ranks(1, {python(rank)!r}, {str(tmp_path)!r})\n"
        "os._exit(code + 40)"
    )
    read, write = os.pipe()
    process = subprocess.Popen(python(code), stdout=write)
    os.close(write)
    os.close(read)
    assert process.wait(30) == 40
    assert len((tmp_path / "rank_0.log").read_text().splitlines()) == 2000


def test_a_command_that_cannot_start_leaves_no_rank(tmp_path):
    with pytest.raises(FileNotFoundError):
        run_ranks(2, [str(tmp_path / "nothing")], tmp_path)


def test_attempts_are_numbered(tmp_path):
    assert [new_attempt(tmp_path).name for _ in range(3)] == ["attempt_0", "attempt_1", "attempt_2"]
    (tmp_path / "logs" / "attempt_10").mkdir()
    (tmp_path / "logs" / "attempt_x").mkdir()
    assert new_attempt(tmp_path) == tmp_path / "logs" / "attempt_11"


def test_stop_flag_keeps_the_first_signal_and_restores_handlers():
    former = {number: signal.getsignal(number) for number in StopFlag.SIGNALS}
    with StopFlag() as stop:
        assert stop.requested is None
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.requested == "SIGUSR1"
    assert {number: signal.getsignal(number) for number in StopFlag.SIGNALS} == former
