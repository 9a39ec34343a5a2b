"""Telemetry on a disk that is full or fails: nothing raises, nothing is torn, and it goes on when there is room.

The system's limit on the size of a file stands in for the full disk: it cuts writes short and refuses them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_vlmr1.telemetry import lines
from megatron_vlmr1.telemetry.files import write_or_warn
from megatron_vlmr1.telemetry.lines import LineFile, append_whole
from megatron_vlmr1.telemetry.metrics import MetricsWriter, read_metrics
from tests.events import tensorboard_points


@contextmanager
def files_no_longer_than(count: int) -> Iterator[None]:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_write_that_is_cut_short_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new/lines"
    append_whole(path, b"first\n")
    for room in range(6):
        with files_no_longer_than(6 + room), pytest.raises(OSError):
            append_whole(path, b"second\n")
        assert path.read_bytes() == b"first\n"
    append_whole(path, b"second\n")
    path.write_bytes(path.read_bytes() + b"torn")
    append_whole(path, b"third\n")
    assert path.read_bytes() == b"first\nsecond\ntorn\nthird\n"


def test_lines_wait_and_are_written_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_MAX_WAITING", 3)
    file = LineFile(tmp_path / "lines")
    file.append(b"0\n")
    with files_no_longer_than(3):
        for number in range(1, 6):
            file.append(b"%d\n" % number)
            assert file.unwritten == number
    assert file.path.read_bytes() == b"0\n"
    file.flush()
    assert file.path.read_bytes() == b"0\n3\n4\n5\n" and file.unwritten == 2
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "2 lines were lost" in caplog.records[1].message


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["write", "close"])
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int, call: str) -> None:
    class Failing:
        """A file whose write or close fails."""

        def __init__(self, file) -> None:
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            if call == "write":
                raise OSError(fault, os.strerror(fault))
            return int(self._file.write(data[:3]))  # of which close then tells

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self._file.close()
            if call == "close":
                raise OSError(fault, os.strerror(fault))

    file = LineFile(tmp_path / "lines")
    original = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args, **kwargs: Failing(original(*args, **kwargs)))
        file.append(b"first\n")
    assert file.unwritten == 1
    file.append(b"second\n")
    assert (file.unwritten, file.path.read_bytes()) == (0, b"first\nsecond\n")


def test_metrics_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"x": 0.0})
    used = (tmp_path / "metrics.jsonl").stat().st_size
    with files_no_longer_than(used + 20), caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            writer.write(step, {"x": float(step)})
    assert [step for step, _ in read_metrics(tmp_path)] == [0]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]  # one a file
    writer.write(4, {"x": 4.0})
    writer.write(5, {"x": 5.0})
    writer.close()
    rows = read_metrics(tmp_path)
    assert [(step, row["x"]) for step, row in rows] == [(step, float(step)) for step in range(6)]
    assert [row["telemetry/unwritten_lines"] for _, row in rows] == [0, 0, 1, 2, 3, 0]
    assert [row["telemetry/lost_points"] for _, row in rows] == [0, 0, 1, 2, 3, 3]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert tensorboard_points(tmp_path, "x") == [(0, 0.0), (4, 4.0), (5, 5.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # no empty file of each attempt


def test_something_in_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("metrics.jsonl", "facts.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "tensorboard").write_text("in the way")
    writer = MetricsWriter(tmp_path)
    for step in range(3):
        writer.write(step, {"x": 1.0})
    writer.close()
    assert not write_or_warn(tmp_path / "facts.json", b"{}")
    assert len(caplog.records) == 3
