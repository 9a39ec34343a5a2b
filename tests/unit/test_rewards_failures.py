"""Failures are counted by kind."""

from __future__ import annotations

import pytest

from megatron_vlmr1.rewards import failures


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("deadline of 1.5 s exceeded", "deadline"),
        ("worker died (exit code -9)", "worker"),
        ("worker stuck", "worker"),
        ("too_long: more than 8388608 bytes", "too_long"),
        ("iou: too_long: more than 262144 bytes of text", "too_long"),
        ("bomb: out of memory", "memory"),
        ("no answer from the reward service within 3 s", "no_answer"),
        ("iou: the solution holds no box", "not_judged"),
        ("odd: KeyError: 'worker '", "not_judged"),
        ("", "not_judged"),
    ],
)
def test_kind(reason: str, kind: str) -> None:
    assert failures.kind(reason) == kind and kind in failures.KINDS
