"""Transformer Engine's layers against torch's, and FP8 against bf16. Bounds go by what bf16 itself is off from fp32."""

from __future__ import annotations

import pytest

from megatron_vlmr1.config import PrecisionConfig
from megatron_vlmr1.models import fp8
from megatron_vlmr1.models.specs import Layers
from megatron_vlmr1.runtime import device
from tests.gpu import work
from tests.gpu.conftest import needs_cuda
from tests.gpu.work import BF16, FP8_BY_BF16, FP32, Passes

LEAST_COSINE = 0.9  # of gradients; in backward e5m2 has 3 binary digits


@pytest.fixture(scope="module")
def exact(directory, mesh) -> Passes:
    """In fp32, by torch's modules."""
    return work.passes(work.policy(directory, mesh, FP32), work.drawn(directory))


@pytest.fixture(scope="module")
def in_bf16(directory, mesh) -> Passes:
    """In bf16, by torch's modules."""
    return work.passes(work.policy(directory, mesh, BF16), work.drawn(directory))


def test_bf16_is_near_fp32(exact, in_bf16, report):
    """The measure of all else: a few roundings of a random model of four layers."""
    report("bf16 to fp32, mean log-prob difference", work.apart(in_bf16.logprobs, exact.logprobs), 0.1)
    report("bf16 to fp32, worst relative gradient", work.worst_gradient(in_bf16, exact), 0.2)


@pytest.mark.usefixtures("engine")
def test_te_in_bf16_is_as_near_as_torch(directory, mesh, exact, in_bf16, report):
    found = work.passes(work.policy(directory, mesh, BF16, Layers("te")), work.drawn(directory))
    own = work.apart(in_bf16.logprobs, exact.logprobs)
    report("te in bf16 to fp32, mean log-prob difference", work.apart(found.logprobs, exact.logprobs), 2 * own)
    own = work.worst_gradient(in_bf16, exact)
    report("te in bf16 to fp32, worst relative gradient", work.worst_gradient(found, exact), 2 * own)


@pytest.mark.usefixtures("engine")
def test_te_in_fp32(directory, mesh, exact, in_bf16, report):
    """Its products of fp32 numbers go through TF32, which has 8 times the digits of bf16: half of bf16's error."""
    found = work.passes(work.policy(directory, mesh, FP32, Layers("te")), work.drawn(directory))
    own = work.apart(in_bf16.logprobs, exact.logprobs)
    report("te in fp32, mean log-prob difference", work.apart(found.logprobs, exact.logprobs), own / 2)
    report(
        "te in fp32, worst relative gradient",
        work.worst_gradient(found, exact),
        work.worst_gradient(in_bf16, exact) / 2,
    )


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("recipe", sorted(fp8.CAPABILITY))
def test_fp8_is_near_bf16(directory, mesh, exact, in_bf16, report, recipe):
    needs_cuda("products in FP8")
    if device.capability() < fp8.CAPABILITY[recipe] or device.cuda_version() < fp8.CUDA[recipe]:
        pytest.skip(f"{recipe} needs capability {fp8.CAPABILITY[recipe]} and CUDA {fp8.CUDA[recipe]}")
    layers = Layers("te", PrecisionConfig(fp8=recipe))
    policy = work.policy(directory, mesh, BF16, layers)
    if recipe == "delayed":  # its scales come from the pass before
        work.passes(policy, work.drawn(directory))
    found = work.passes(policy, work.drawn(directory))
    assert not found.logprobs.equal(in_bf16.logprobs)  # products really are in FP8
    bound = FP8_BY_BF16 * work.apart(in_bf16.logprobs, exact.logprobs)
    report(f"{recipe} to bf16, mean log-prob difference", work.apart(found.logprobs, in_bf16.logprobs), bound)
    report(f"{recipe} to bf16, 1 - cosine of gradients", 1 - work.alignment(found, in_bf16), 1 - LEAST_COSINE)
