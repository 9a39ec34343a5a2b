"""Products in FP8 on tensor cores against the same numbers multiplied in fp32."""

from __future__ import annotations

import pytest
import torch

from megatron_vlmr1.models import fp8
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.rollout import quantised
from megatron_vlmr1.runtime import device
from tests import recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not device.has_cuda() or device.capability() < quantised.CAPABILITY, reason="no CUDA device of Hopper or later"
    ),
]


@pytest.mark.parametrize("tokens", [1, 8, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_the_emulated_one(tokens: int, with_bias: bool) -> None:
    """At the sides of 7B's matrices: but for the rounding to bf16, and the sums of tensor cores."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

    for rows, columns in fp8.matrices(read_shape(recipes.published("7b")).text, 1).values():
        weight, x = quantised.QuantisedWeight(drawn(rows, columns)), drawn(tokens, columns)
        bias = drawn(rows) if with_bias else None
        weight.refresh()
        expected = quantised.emulate(*quantised.quantise(x), weight.values, weight.scales, bias)
        found = weight.product(x, bias)
        assert found.dtype == torch.bfloat16
        size = columns**0.5  # of a sum of so many products of normal numbers
        assert (found - expected).abs().max() <= 2.0**-8 * expected.abs().max() + 1e-3 * size
