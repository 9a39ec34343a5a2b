"""What counts as a gradient that may be stepped by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vlmr1.parallel.optimizer import gradients_finite
from tests.distributed import ranks


@pytest.mark.parametrize(
    ("value", "finite"),
    [(0.0, True), (1e18, True), (-1e20, False), (float("nan"), False), (float("inf"), False), (-float("inf"), False)],
)
def test_a_single_number_and_the_norm(value: float, finite: bool) -> None:
    gradients = torch.zeros(100)
    gradients[63] = value
    ddp: Any = SimpleNamespace(buffers=[SimpleNamespace(grad_data=torch.ones(5)), SimpleNamespace(grad_data=gradients)])
    with ranks.alone():
        assert gradients_finite([ddp]) is finite
        assert not gradients_finite([], [torch.tensor(value), torch.tensor(float("nan"))])
