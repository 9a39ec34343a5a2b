"""The same step failing three times in a row, from what the attempts left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlmr1.runtime import attempts, heartbeat
from megatron_vlmr1.runtime.heartbeat import Heartbeat


def attempt(
    logs: Path, number: int, step: int | None, resumed: int = 4, code: int | None = None, error: str = ""
) -> Path:
    """An attempt of two ranks, of which the second was a step behind and was killed."""
    folder = logs / f"attempt_{number}"
    folder.mkdir(parents=True)
    for rank in range(2):
        done = None if step is None else step - rank
        left = rank == 0
        words = error if left else ""
        heartbeat.write(
            folder,
            Heartbeat(rank, "host", 1, step=done, resumed=resumed, phase="update", left=left, error=words),
        )
    if code is not None:
        attempts.write_outcome(folder, "the reason", code, step)
    return folder


def refused(logs: Path, rows: list[tuple]) -> str:
    for number, row in enumerate(rows):
        attempt(logs, number, *row)
    now = logs / f"attempt_{len(rows)}"
    now.mkdir(parents=True)
    return attempts.crash_loop(now)


def test_three_crashes_of_one_step_are_told_with_their_last_words(tmp_path):
    said = refused(tmp_path, [(7, 0, None, "RuntimeError: reset"), (7, 4, 70), (7, 4)])
    assert said == (
        "step 8 failed 3 times in a row (attempt_0: rank 1 was killed in phase 'update'; rank 0: RuntimeError: reset; "
        "attempt_1: the reason; attempt_2: rank 1 was killed in phase 'update'); mend what is wrong there, then start "
        "once with --retry"
    )
    later = tmp_path / "attempt_4"  # attempt 3 was refused and left nothing but an outcome
    attempts.write_outcome(tmp_path / "attempt_3", said, 17, None)
    later.mkdir()
    assert attempts.crash_loop(later) == said


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(7,), (7,)],
        [(7,), (6,), (7,)],
        [(7,), (8,), (8,)],
        [(7,), (7,), (7, 4, 85), (7,)],  # a checkpoint in between
        [(7,), (7,), (7,), (9, 7, 0)],
        [(7,), (7,), (7, 4, 130)],  # by hand
        [(7,), (7, 4), (7, 6)],  # the second made a checkpoint
        [(None,), (None,), (None,)],  # never came to a step
    ],
)
def test_what_is_no_crash_loop(tmp_path, rows):
    assert refused(tmp_path, rows) == ""


def test_starts_that_came_to_no_step_do_not_hide_it(tmp_path):
    assert refused(tmp_path, [(7,), (None,), (7,), (None, 0, 2), (7,)]).startswith("step 8 failed 3 times")


def test_trying_again_forgets_what_failed_before(tmp_path):
    for number in range(4):
        attempt(tmp_path, number, 7)
    (tmp_path / "attempt_3" / attempts.RETRY).touch()
    assert attempts.crash_loop(tmp_path / "attempt_4") == ""
    attempt(tmp_path, 4, 7)
    assert attempts.crash_loop(tmp_path / "attempt_5") == ""
    attempt(tmp_path, 5, 7)
    assert "(attempt_3: " in attempts.crash_loop(tmp_path / "attempt_6")  # three times again


def test_trying_again_counts_even_where_that_came_to_no_step(tmp_path):
    for number in range(3):
        attempt(tmp_path, number, 7)
    attempt(tmp_path, 3, None)
    assert attempts.crash_loop(tmp_path / "attempt_4") != ""
    (tmp_path / "attempt_3" / attempts.RETRY).touch()
    assert attempts.crash_loop(tmp_path / "attempt_4") == ""


def test_ranks_that_were_asked_to_stop_and_killed_did_not_crash(tmp_path):
    for number in range(3):
        attempt(tmp_path, number, 7)
    for rank in range(2):
        assert attempts.crash_loop(tmp_path / "attempt_3") != ""  # one was asked because the other had crashed
        record = heartbeat.read(tmp_path / "attempt_1", rank)
        assert record is not None
        heartbeat.write(tmp_path / "attempt_1", replace(record, asked="SIGTERM"))
    assert attempts.crash_loop(tmp_path / "attempt_3") == ""


def test_an_unreadable_outcome_is_a_crash_and_a_folder_of_another_name_has_no_history(tmp_path):
    for number in range(3):
        attempt(tmp_path, number, 7)
    (tmp_path / "attempt_2/outcome.json").write_text("{")
    (tmp_path / "attempt_3").mkdir()
    assert attempts.crash_loop(tmp_path / "attempt_3") != ""
    assert attempts.crash_loop(tmp_path / "logs") == ""
