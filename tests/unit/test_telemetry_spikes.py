"""What counts as a spike, and what is remembered of it."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from megatron_vlmr1.config.train import TrainConfig
from megatron_vlmr1.telemetry.spikes import Spikes


def numbers(loss: float, norm: float, **more: float) -> dict[str, float]:
    return {"train/loss": loss, "train/grad_norm": norm, "train/skipped": 0.0, **more}


@pytest.mark.parametrize("loss", [2.0, 1e-9], ids=["sft", "grpo"])
def test_a_spike_is_flagged_and_noise_and_a_trend_are_not(loss: float, caplog: pytest.LogCaptureFixture) -> None:
    spikes, rng = Spikes(10.0, 50), np.random.default_rng(0)
    flagged = []
    for step in range(300):
        norm = 40.0 if step in (100, 200) else (1.0 - step / 600) * float(np.exp(0.3 * rng.standard_normal()))
        flags = spikes.flags(step, numbers(loss * (1 + 0.1 * rng.standard_normal()), norm))
        flagged += [(step, name) for name, value in flags.items() if value]
    assert flagged == [(100, "train/grad_spike"), (200, "train/grad_spike")]
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 101", "step 201"]
    assert all(len(values) == 50 for values in spikes.recent.values())


def test_a_loss_that_triples_is_a_spike_though_it_is_no_multiple_of_ten() -> None:
    spikes, rng = Spikes(10.0, 50), np.random.default_rng(1)
    for step in range(30):
        spikes.flags(step, numbers(2.0 + 0.05 * rng.standard_normal(), 1.0))
    assert spikes.flags(30, numbers(6.0, 1.0)) == {"train/loss_spike": 1.0, "train/grad_spike": 0.0}
    assert spikes.flags(31, numbers(0.5, 1.0))["train/loss_spike"] == 0.0  # a fall is none


def test_skipped_steps_and_the_first_ones_say_nothing() -> None:
    spikes = Spikes(10.0, 50)
    assert all(not spikes.flags(step, numbers(1.0, 1.0)) for step in range(10))
    skipped = numbers(math.nan, math.nan) | {"train/skipped": 1.0}
    assert spikes.flags(10, skipped) == {} == spikes.flags(10, {"reward/mean": 1.0})
    assert [len(values) for values in spikes.recent.values()] == [10, 10]
    assert spikes.flags(11, numbers(1.0, 1.0)) == {"train/loss_spike": 0.0, "train/grad_spike": 0.0}
    assert Spikes(0.0, 50, spikes.recent).flags(12, numbers(99.0, 99.0)) == {}


def test_a_resumed_run_goes_on_where_it_was(caplog: pytest.LogCaptureFixture) -> None:
    first = Spikes(10.0, 20)
    for step in range(30):
        first.flags(step, numbers(1.0 + step % 3, 1.0))
    resumed = Spikes(10.0, 20, first.recent)
    with caplog.at_level(logging.CRITICAL):
        both = [spikes.flags(30, numbers(2.0, 50.0)) for spikes in (first, resumed)]
    assert both[0] == both[1] == {"train/loss_spike": 0.0, "train/grad_spike": 1.0}


def test_a_window_that_would_flag_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="spike_window"):
        TrainConfig(spike_window=9)
