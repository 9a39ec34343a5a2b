"""Attention over packed rows in bf16, which takes flash kernels on CUDA, against the padded batches of fp32."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.runtime import device
from tests.gpu.conftest import needs_cuda

OUTPUT, GRADIENT = 0.01, 0.02  # relative: a rounding to bf16 is at most 0.004, a gradient passes through several


class Case(NamedTuple):
    """Heads, and lengths of segments: a prompt and its completions, group by group."""

    heads: int
    kv_heads: int
    size: int
    groups: list[list[int]]
    causal: bool


CASES = {
    "groups of the 3b model": Case(16, 2, 128, [[300, 50, 1, 77], [128, 128, 128], [40], [1, 1, 2]], True),
    "groups of the 7b model": Case(28, 4, 128, [[512, 31, 200, 9, 150, 1, 64, 100, 256]], True),
    "prompts without completions": Case(16, 16, 64, [[17], [1], [200], [64]], True),
    "windows of the tower": Case(16, 16, 80, [[64]] * 20 + [[32], [16], [8]], False),
    "whole images of the tower": Case(16, 16, 80, [[1564], [64], [1024]], False),
}


def segments(case: Case) -> list[Segment]:
    out, at = [], 0
    for prompt, *completions in case.groups:
        first = at
        out.append(Segment(at, at := at + prompt))
        for length in completions:
            out.append(Segment(at, at := at + length, (first, first + prompt)))
    return out


def passes(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return outputs and gradients of q, k, v, in fp32; the inputs are bf16 numbers in both types."""
    laid = segments(case)
    generator = torch.Generator().manual_seed(2)
    sizes = [(laid[-1].stop, heads, case.size) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    q, k, v, upstream = (torch.randn(size, generator=generator).bfloat16().to(device.device(), dtype) for size in sizes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = AttentionPlan(laid, case.causal).attend(1, *leaves)
    out.backward(upstream)
    return [x.detach().float() for x in (out, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


@pytest.mark.parametrize("name", CASES)
def test_bf16_against_padded_batches_in_fp32(name, report):
    found, exact = passes(CASES[name], torch.bfloat16), passes(CASES[name], torch.float32)
    assert len(found) == len(exact) == 4
    for what, a, b in zip(("output", "dq", "dk", "dv"), found, exact, strict=True):
        bound = OUTPUT if what == "output" else GRADIENT
        report(f"{name}, {what}, relative difference", float((a - b).norm() / b.norm()), bound)


def test_scores_are_never_held(report):
    """A group of 8,192 tokens: less memory in forward and backward than a tenth of one head's scores, all heads."""
    needs_cuda("the allocator's peak")
    case = Case(16, 2, 128, [[1024, *[1024] * 7]], True)
    passes(case, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    device.peak_bytes()
    passes(case, torch.bfloat16)
    tokens = segments(case)[-1].stop
    inputs = 12 * tokens * (2 * case.heads + 2 * case.kv_heads) * case.size  # all tensors and gradients, and in fp32
    scores = case.heads * tokens**2 * 2
    report("memory beside inputs and outputs, of all scores", (device.peak_bytes() - before - inputs) / scores, 0.1)
