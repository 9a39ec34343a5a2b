"""What is taken out of a distribution, against transformers' own processors."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as theirs

from megatron_vlmr1.rollout.filters import filtered

NONE = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
HISTORY = torch.tensor([[1, 5, 5, 90], [7, 8, 9, 10], [0, 299, 3, 1]])


def rows() -> torch.Tensor:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, [4, 250]] = float("-inf")  # banned
    logits[2, 20:24] = logits[2].max()  # likeliest, and alike
    return logits


def ours(**settings: float) -> torch.Tensor:
    seen = torch.zeros(3, 300, dtype=torch.bool).scatter_(1, HISTORY, True)
    return filtered(rows(), seen, **{**NONE, **settings})  # type: ignore[arg-type]


PROCESSORS = {
    "repetition_penalty": lambda value: theirs.RepetitionPenaltyLogitsProcessor(value),
    "temperature": lambda value: theirs.TemperatureLogitsWarper(value),
    "top_k": lambda value: theirs.TopKLogitsWarper(value),
    "top_p": lambda value: theirs.TopPLogitsWarper(value),
    "min_p": lambda value: theirs.MinPLogitsWarper(value),
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.8},
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.2, "temperature": 1.7, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_as_transformers(settings):
    expected = rows()
    for name, processor in PROCESSORS.items():
        if name in settings:
            expected = processor(settings[name])(HISTORY, expected)
    found = ours(**settings)
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert found.isfinite().any(-1).all()
