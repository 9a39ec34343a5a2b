"""The shape of the learning rate."""

from __future__ import annotations

import math

import pytest

from megatron_vlmr1.config import OptimizerConfig
from megatron_vlmr1.parallel.optimizer import learning_rate


def rates(steps: int, **settings) -> list[float]:
    cfg = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(cfg, step, steps) for step in range(steps + 2)]


def test_constant():
    assert rates(4) == [1.0] * 6


def test_warm_up_is_linear_and_never_zero():
    assert rates(6, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_linear():
    assert rates(4, decay="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    assert rates(4, decay="linear", min_lr_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert rates(5, decay="linear", warmup_steps=1) == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0, 0])


def test_cosine():
    expected = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert rates(4, decay="cosine") == pytest.approx([*expected, 0], abs=1e-12)
    assert rates(4, decay="cosine", min_lr_ratio=0.1)[4:] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run(decay):
    found = rates(3, warmup_steps=10, decay=decay)
    assert found == pytest.approx([(step + 1) / 11 for step in range(5)])
