"""`vlmr1 shards build`, killed at drawn moments: the same command goes on, and gives the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import compressed, picture

ROWS = 1000


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for i in range(20):
        (folder / f"{i}.jpg").write_bytes(compressed(picture(100 + i, 80, seed=i)))
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(ROWS):
            turns = [{"from": "human", "value": f"q{i} " + "x" * (i * 37 % 600)}, {"from": "gpt", "value": "a"}]
            file.write(json.dumps({"image": f"{i % 20}.jpg", "conversations": turns}) + "\n")
    return folder


def command(rows: Path, out: Path, workers: int) -> list[str]:
    words = ["shards", "build", str(out), "--jsonl", str(rows / "rows.jsonl"), "--shard-size", "20KB"]
    return [sys.executable, "-m", "megatron_vlmr1.cli", *words, "--workers", str(workers), "--json"]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(rows: Path) -> dict[str, bytes]:
    subprocess.run(command(rows, rows.parent / "whole", 1), check=True, capture_output=True)
    return content(rows.parent / "whole")


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_builds_go_on(workers: int, rows: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    drawn = random.Random(workers)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    shards = len([name for name in whole if name.endswith(".tar")])
    assert shards > 100
    for kill in range(2):
        # the moments: before the first shard, and when so many are there
        wanted = drawn.randrange(shards // 4) + kill * shards // 3
        process = subprocess.Popen(command(rows, out, workers), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len([*partial.glob("shard-*.tar")]) < wanted and process.poll() is None:
            time.sleep(0.005)
        children = descendants(process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert not out.exists(), "it was finished before it was killed"
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    done = subprocess.run(command(rows, out, workers), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == ROWS
    assert content(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
