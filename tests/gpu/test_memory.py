"""Gradients and optimizer state away from the device and back: the bits stay, and the memory is given back."""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed.work_memory_phases import Offloading, _bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("when", ["rollout", "always"])
def test_offloading_keeps_bits(directory, mesh, dtype, when):
    trainer = Offloading(directory, mesh, dtype, {"optimizer": {"offload": when}})
    offload = trainer.updater.offload
    for _ in range(2):  # the second time, host memory is there already
        assert math.isfinite(trainer.step()["train/grad_norm"])
        offload.before_step()
        before, held = trainer.digest(), _bytes(trainer)
        on_device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        offload.before_generation()
        assert _bytes(trainer) == {"gradients": 0, "state": 0} and min(held.values()) > 0
        if torch.cuda.is_available():
            assert on_device - torch.cuda.memory_allocated() >= sum(held.values())
        assert offload.host_bytes == held["state"]
        assert trainer.digest() == before
        assert _bytes(trainer) == {"gradients": 0, "state": held["state"]}
