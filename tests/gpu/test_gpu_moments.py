"""Moments in fewer bytes with Transformer Engine's own Adam, as `tests/unit/test_moments.py` with a stand-in."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.unit.test_moments import (  # noqa: F401 - collected here
    directory,
    test_a_flipped_bit_is_found,
    test_a_parameter_without_gradients_stays,
    test_a_run_goes_on_with_other_moments,
    test_offloading_keeps_the_bits,
    test_steps,
    test_the_plan_counts_what_is_held,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
        reason="no CUDA device, or no Transformer Engine",
    ),
]
