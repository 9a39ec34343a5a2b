"""``vlmr1 rewards``: jsonl in, jsonl out; the service in the foreground."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1.cli.main import main
from megatron_vlmr1.rewards import functions
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.item import RewardItem

VLMR1 = [sys.executable, "-m", "megatron_vlmr1.cli", "rewards"]
GOOD = {"reward": "iou", "completion": "<answer>[0, 0, 10, 10]</answer>", "solution": "[0, 0, 10, 20]"}


def score(data: bytes, *options: str) -> list[dict[str, Any]]:
    done = subprocess.run([*VLMR1, "score", *options], input=data, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def test_score_keeps_order_and_goes_on_after_bad_lines() -> None:
    scaled = GOOD | {"image_size": [100, 100], "grid_thw": [1, 10, 10], "compat": None}
    compat = scaled | {"compat": "vlm-r1", "completion": "<answer>[ 0, 0, 140, 140]</answer>"}
    rows = [
        GOOD,
        b"not json\n",
        scaled,
        b"\n",
        compat | {"solution": "<answer>[0, 0, 100, 100]</answer>"},
        compat,
        GOOD | {"reward": "nope"},
        GOOD | {"grid": 1},
        [1],
        b"[" * 200_000 + b"\n",
        b'{"reward": "iou", "completion": "' + b"x" * (17 << 20) + b'"}\n',
        b"\xff\xfe\xfd\n",
        GOOD | {"reward": "format", "completion": "<think>\ud800</think><answer>\0</answer>"},
        GOOD | {"reward": "format", "completion": "x" * 300_000},
        GOOD | {"solution": "none"},
        json.dumps(GOOD).encode(),  # no newline at the end
    ]
    out = score(lines(*rows))
    assert len(out) == len(rows)
    half = {"value": 0.5, "parts": {"iou": 0.5}, "failure": None}
    assert out[0] == out[15] == half
    assert out[2]["value"] == pytest.approx((100 / 14) ** 2 / 200)
    assert out[4] == {"value": 0.0, "parts": {"iou": 0.0}, "failure": None}
    assert out[12] == {"value": 1.0, "parts": {"format": 1.0}, "failure": None}
    problems = {
        1: "line 2: not json",
        3: "line 4: not json",
        5: "iou: the published reward raises IndexError",
        6: "line 7: no reward named nope; known: ",
        7: "line 8: unknown key grid; known: ",
        8: "line 9: not a json object",
        9: "line 10: not json",
        10: "line 11: too_long",
        11: "line 12: not json",
        13: "format: too_long",
        14: "iou: the solution holds no box",
    }
    for index, problem in problems.items():
        assert out[index]["value"] is None
        assert out[index]["parts"] == {}
        assert out[index]["failure"].startswith(problem), out[index]
        assert out[index].get("line") == (index + 1 if problem.startswith("line") else None)


def test_score_answers_line_by_line() -> None:
    """A program may wait for each answer before it writes the next line."""
    process = subprocess.Popen([*VLMR1, "score", "--workers", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    for _ in range(3):
        process.stdin.write(lines(GOOD))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["value"] == 0.5
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_score_with_a_function_of_the_users_own(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def brevity(item):\n    print('noise')\n    return 1 / (1 + len(item.completion))\n")
    row = {"reward": "brevity", "completion": "abc", "solution": ""}
    out = score(lines(row, row | {"reward": "missing"}), "--functions", str(own))
    assert out[0] == {"value": 0.25, "parts": {"brevity": 0.25}, "failure": None}
    assert out[1]["failure"].startswith("missing: ValueError: no reward named missing and none in ")


def test_score_with_a_jobs_copy_of_a_users_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.py"
    own.symlink_to(tmp_path / "gone.py")
    copy = functions.copy_in(tmp_path / "files", str(own))
    copy.parent.mkdir(parents=True)
    copy.write_text("def brevity(item):\n    return 1 / (1 + len(item.completion))\n")
    monkeypatch.setenv(functions.FROZEN, str(tmp_path / "files"))
    row = {"reward": "brevity", "completion": "abc", "solution": ""}
    assert score(lines(row), "--functions", str(own)) == [{"value": 0.25, "parts": {"brevity": 0.25}, "failure": None}]


def test_list(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "list", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert [*said] == functions.names() and all("1 or 0" in words or "Range [" in words for words in said.values())
    assert main(["rewards", "list"]) == 0
    table = capfd.readouterr().out
    assert all(f" {name} " in table for name in said)


def test_nothing_in_nothing_out() -> None:
    assert score(b"") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "--workers", "0"], "--workers: "),
        (["score", "--deadline-s", "nan"], "--deadline-s: "),
        (["score", "--memory-bytes", "1000"], "memory_bytes must be at least"),
        (["score", "--functions", "/none.py"], "/none.py: no such file"),
        (["serve", "--bind", "udp://127.0.0.1:1"], "expected ipc://PATH or tcp://ADDRESS:PORT"),
        (["keys", str(Path(__file__).parent)], "exists already; name a new folder"),
    ],
)
def test_wrong_settings_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_serve(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    process = subprocess.Popen(
        [*VLMR1, "serve", "--bind", address, "--workers", "1"], stderr=subprocess.PIPE, text=True
    )
    with RewardClient(address) as client:
        client.submit("a", RewardItem(GOOD["completion"], GOOD["solution"]), {"iou": 1.0})
        assert client.collect(["a"], 60)["a"].value == 0.5
        assert client.stats()["service_pid"] == process.pid
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1].rstrip().endswith("stopped")
    assert process.returncode == 0


@pytest.mark.parametrize("damage", ["none", "no server", "no client", "not a key", "short"])
def test_serve_with_wrong_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    folder, command = tmp_path / "keys", [*VLMR1, "serve", "--bind", "tcp://127.0.0.1:0"]
    assert main(["rewards", "keys", str(folder)]) == 0 and capsys.readouterr().out == f"{folder}\n"
    secret = folder / "server.key_secret"
    expected = {
        "none": "error: --bind tcp://127.0.0.1:0: needs --keys",
        "no server": f"error: {secret}: not a key (",
        "no client": f"error: {folder}/clients: holds no key of anybody who may ask",
        "not a key": f"error: {secret}: not a key (",
        "short": f"error: {secret}: not a key of 32 bytes",
    }
    if damage == "no server":
        secret.unlink()
    elif damage == "no client":
        (folder / "clients/client.key").unlink()
    elif damage == "not a key":
        secret.write_text("hello")
    elif damage == "short":
        secret.write_text('public-key = "abcde"\nsecret-key = "abcde"\n')
    command += [] if damage == "none" else ["--keys", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(expected[damage])


@pytest.mark.parametrize("name", ["file", "missing/socket", "x" * 120])
def test_serve_where_it_cannot(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    command = [*VLMR1, "serve", "--bind", f"ipc://{tmp_path / name}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --bind ipc://")
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_the_service_starts_within_a_second() -> None:
    """Its imports, that is, on an idle machine in 0.2 s: no torch, no numpy, no configuration."""
    heavy = "('torch', 'numpy', 'pydantic')"
    code = f"import sys, megatron_vlmr1.rewards.server; print(*(m for m in {heavy} if m in sys.modules))"
    times = []
    for _ in range(3):
        start = time.monotonic()
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"\n"
        times.append(time.monotonic() - start)
    assert min(times) < 1.0
