"""Attention over packed rows against a plain loop over queries."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vlmr1.models.attention import AttentionPlan, repeated
from megatron_vlmr1.models.segments import Segment, rung


def plain(segments: list[Segment], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v, query by query."""
    out = torch.zeros_like(q)
    per = q.shape[1] // k.shape[1]
    for s in segments:
        for row in range(s.start, s.stop):
            keys = [*range(*(s.prefix or (0, 0))), *range(s.start, row + 1 if causal else s.stop)]
            for head in range(q.shape[1]):
                scores = k[keys, head // per] @ q[row, head] / math.sqrt(q.shape[2])
                out[row, head] = torch.softmax(scores, 0) @ v[keys, head // per]
    return out


def lay(lengths: list[int], group: int) -> list[Segment]:
    """Prompts, each followed by `group` completions that see it."""
    segments, start = [], 0
    for i, n in enumerate(lengths):
        prompt = segments[i - i % (group + 1)] if i % (group + 1) else None
        segments.append(Segment(start, start + n, (prompt.start, prompt.stop) if prompt else None))
        start += n
    return segments


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_groups_and_gradients(kv_heads, causal):
    torch.manual_seed(0)
    segments = lay([7, 3, 0, 5, 12, 1, 2, 2, 1, 9, 9, 9], 3)
    total = segments[-1].stop
    tensors = [torch.randn(total, heads, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)]
    results = []
    for attend in (
        lambda q, k, v: AttentionPlan(segments, causal).attend(1, q, k, v),
        lambda q, k, v: plain(segments, q, k, v, causal),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = attend(*leaves)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_a_query_sees_nothing_of_other_sequences():
    segments = lay([6, 4, 4, 6, 4, 4], 2)
    q, k, v = torch.randn(3, segments[-1].stop, 2, 8).unbind(0)
    before = AttentionPlan(segments).attend(1, q, k, v)
    k[10:14], v[10:14] = 1e3, 1e3  # the second completion of the first group
    after = AttentionPlan(segments).attend(1, q, k, v)
    same = (before == after).flatten(1).all(1)
    assert same[:10].all() and same[14:].all() and not same[10:14].any()


def test_padding_costs_at_most_a_half():
    for n in range(1, 5000):
        assert n <= rung(n) <= max(n, 1.5 * n - 0.5), n
    assert len({rung(n) for n in range(1, 5000)}) <= 2 * 13


def test_no_token_at_all():
    q = torch.zeros(0, 2, 8)
    assert AttentionPlan([]).attend(1, q, q, q).shape == (0, 2, 8)


def test_heads_in_groups_are_as_heads_repeated():
    torch.manual_seed(0)
    segments = lay([7, 3, 4], 2)
    q, k, v = (torch.randn(14, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    expected = AttentionPlan(segments).attend(1, q, k, v)
    assert torch.allclose(AttentionPlan(segments).attend(1, q, repeated(k, 6), repeated(v, 6)), expected, atol=1e-12)
    assert repeated(q, 6) is q
