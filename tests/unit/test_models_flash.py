"""Flash attention's two calls and their sum, with a kernel in plain torch, against padded batches with masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_vlmr1.config import RecomputeConfig
from megatron_vlmr1.models import attention
from megatron_vlmr1.models.attention import AttentionPlan, PaddedPlan, repeated
from megatron_vlmr1.models.flash import FlashPlan, Gradients, Sequences, State, TorchFlash
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.plan.activations import attention as attention_bytes
from megatron_vlmr1.plan.load import unpadded
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import Group
from tests.checkpoints import mixed_prompts, write_random_checkpoint
from tests.distributed import ranks, work


class PlainFlash:
    """A `Kernel` sequence by sequence, with all scores; it takes any type, on any device."""

    def __init__(self) -> None:
        self.calls: list[Sequences] = []

    @staticmethod
    def takes(_: torch.Tensor) -> bool:
        return True

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, over: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, State]:
        self.calls.append(over)
        out, lse = torch.full_like(q, math.nan), _wide(q).new_full((q.shape[1], q.shape[0]), math.nan)
        for asking, asked in _pairs(q, k, over):
            scores, values = _scores(q, k, asking, asked, over.causal), _heads(v[asked], q)
            lse[:, asking] = scores.logsumexp(-1)
            out[asking] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
        return out, lse, (torch.tensor([len(self.calls)]),)

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        over: Sequences,
        state: State,
    ) -> Gradients:
        assert self.calls[state[0] - 1] is over  # each call has its own state back
        assert grad.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
        of_queries, of_keys, of_values = (torch.full_like(x, math.nan) for x in (q, k, v))
        for asking, asked in _pairs(q, k, over):
            probabilities = (_scores(q, k, asking, asked, over.causal) - lse[:, asking, None]).exp()  # [H, q, k]
            upstream, queries = (_heads(x[asking], q) for x in (grad, q))
            keys, values = (_heads(x[asked], q) for x in (k, v))
            delta = (upstream * _heads(out[asking], q)).sum(-1, keepdim=True)
            of_scores = probabilities * (upstream @ values.mT - delta) / math.sqrt(q.shape[2])
            of_queries[asking] = (of_scores @ keys).transpose(0, 1).to(q.dtype)
            of_keys[asked] = _by_group(of_scores.mT @ queries, k)
            of_values[asked] = _by_group(probabilities.mT @ upstream, v)
        return of_queries, of_keys, of_values


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pairs(q: torch.Tensor, k: torch.Tensor, over: Sequences) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and of keys, sequence by sequence; no sequence may be empty, and all rows must be there."""
    ends = over.ends_q.tolist(), over.ends_k.tolist()
    assert over.ends_q.dtype == over.ends_k.dtype == torch.int32
    assert [each[0] for each in ends] == [0, 0] and [each[-1] for each in ends] == [len(q), len(k)]
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        assert 0 < b - a <= over.max_q and 0 < d - c <= over.max_k and (not over.causal or b - a == d - c)
        yield slice(a, b), slice(c, d)


def _heads(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[T, Hkv, D] -> [H, T, D]."""
    return repeated(_wide(x), q.shape[1]).transpose(0, 1)


def _by_group(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[H, T, D] -> [T, Hkv, D], heads of a group summed."""
    return x.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1).to(like.dtype)


def _scores(q: torch.Tensor, k: torch.Tensor, asking: slice, asked: slice, causal: bool) -> torch.Tensor:
    scores = _heads(q[asking], q) @ _heads(k[asked], q).mT / math.sqrt(q.shape[2])
    return scores + torch.full_like(scores[0], -math.inf).triu(1) if causal else scores


def drawn(seed: int) -> list[Segment]:
    """Groups of 0 to 5 completions; some are empty, some have no prompt, and some rows end in padding."""
    rng, segments, end = np.random.default_rng(seed), [], 0
    for _ in range(rng.integers(1, 5)):
        prompt = Segment(end, end + int(rng.choice([0, 1, 2, 7, 20])))
        segments.append(prompt)
        end = prompt.stop
        for _ in range(rng.integers(0, 6)):
            length = int(rng.choice([0, 1, 1, 2, 5, 13]))
            prefix = (prompt.start, prompt.stop) if rng.random() < 0.8 else None
            segments.append(Segment(end, end + length, prefix))
            end += length
    if rng.random() < 0.5 or not end:
        segments.append(Segment(end, end + 3))
    return [segments[i] for i in rng.permutation(len(segments))] if rng.random() < 0.3 else segments


def tensors(segments: list[Segment], heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    total = max(s.stop for s in segments)
    return [torch.randn(total, h, 8, dtype=torch.float64).to(dtype) for h in (heads, kv_heads, kv_heads)]


def results(attend, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = attend(*leaves)
    (out * torch.arange(out.numel(), dtype=torch.float64).view_as(out).cos().to(out.dtype)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_drawn_layouts_and_their_gradients(heads: int, kv_heads: int, causal: bool) -> None:
    torch.manual_seed(0)
    calls = 0
    for seed in range(24):
        segments, kernel = drawn(seed), PlainFlash()
        given = tensors(segments, heads, kv_heads, torch.float64)
        ours = results(FlashPlan(segments, causal, kernel).attend, given)
        theirs = results(PaddedPlan(segments, causal).attend, given)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10), seed
        assert len(kernel.calls) == 1 + any(
            s.prefix and s.stop > s.start and s.prefix[1] > s.prefix[0] for s in segments
        )
        calls += len(kernel.calls)
    assert 30 < calls < 48


def test_far_scores_are_joined_without_overflow() -> None:
    torch.manual_seed(0)
    segments = [Segment(0, 6), Segment(6, 10, (0, 6)), Segment(10, 14, (0, 6))]
    q, k, v = tensors(segments, 2, 2, torch.float64)
    k[:6] *= 300
    k[10:] *= -1000
    ours = results(FlashPlan(segments, True, PlainFlash()).attend, [q, k, v])
    for a, b in zip(ours, results(PaddedPlan(segments, True).attend, [q, k, v]), strict=True):
        assert torch.isfinite(a).all() and torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_half_precision_is_joined_in_fp32() -> None:
    """As exact as the rounding of either call's output, and of each part of a gradient."""
    torch.manual_seed(0)
    segments = [Segment(0, 40), *(Segment(40 + 20 * i, 60 + 20 * i, (0, 40)) for i in range(4))]
    given = tensors(segments, 4, 2, torch.bfloat16)
    ours = results(FlashPlan(segments, True, PlainFlash()).attend, given)
    exact = results(PaddedPlan(segments, True).attend, [x.double() for x in given])
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b).abs().max() / b.abs().max()) < 3 * 2**-8


def test_one_group_copies_nothing_and_several_copy_rows_once_named() -> None:
    one = [Segment(0, 4), Segment(4, 6, (0, 4)), Segment(6, 9, (0, 4)), Segment(9, 10)]
    behind = FlashPlan(one, True, PlainFlash())._behind
    assert behind is not None and (behind.queries, behind.keys) == (slice(4, 9), slice(0, 4))
    assert behind.over.ends_q.tolist() == [0, 5] and behind.over.ends_k.tolist() == [0, 4]
    two = [*one[:3], Segment(9, 11), Segment(11, 12, (9, 11))]
    behind = FlashPlan(two, True, PlainFlash())._behind
    assert behind is not None and isinstance(behind.queries, torch.Tensor) and isinstance(behind.keys, torch.Tensor)
    assert behind.queries.tolist() == [4, 5, 6, 7, 8, 11] and behind.keys.tolist() == [0, 1, 2, 3, 9, 10]
    assert behind.over.ends_q.tolist() == [0, 5, 6] and behind.over.ends_k.tolist() == [0, 4, 6]
    assert (behind.over.max_q, behind.over.max_k, behind.over.causal) == (5, 4, False)
    with pytest.raises(AssertionError, match="gaps or overlap"):
        FlashPlan([Segment(0, 4), Segment(5, 6)], True, PlainFlash())
    with pytest.raises(AssertionError, match="gaps or overlap"):
        FlashPlan([Segment(1, 4)], True, PlainFlash())


@pytest.mark.parametrize("reentrant", [True, False])
def test_computed_again_and_what_is_kept(reentrant: bool) -> None:
    torch.manual_seed(0)
    segments = [Segment(0, 4), Segment(4, 6, (0, 4)), Segment(6, 9, (0, 4))]
    given = tensors(segments, 4, 2, torch.float64)
    plan = FlashPlan(segments, True, PlainFlash())
    again = results(lambda *x: checkpoint(plan.attend, *x, use_reentrant=reentrant), given)
    assert all(map(torch.equal, again, results(plan.attend, given)))
    kept: list[torch.Tensor] = []
    leaves = [x.clone().requires_grad_() for x in given]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = plan.attend(*leaves)
    shapes = [tuple(x.shape) for x in kept if x.is_floating_point()]
    assert shapes == [(9, 4, 8), (9, 2, 8), (9, 2, 8), (9, 4, 8), (4, 9)] and kept[3].data_ptr() == out.data_ptr()
    # As a plan of GPUs has it: values lie in the fused row; log-sum-exps are fp32 there, and fp64 here.
    assert (
        attention_bytes((unpadded(9),), 9, 32, 16, 4, 8) == sum(kept[i].nbytes for i in (0, 1, 3)) + kept[4].nbytes // 2
    )


def test_no_token_at_all() -> None:
    q = torch.zeros(0, 2, 8)
    assert FlashPlan([Segment(0, 0)], True, PlainFlash()).attend(q, q, q).shape == (0, 2, 8)


GROUPS = [Segment(0, 4), Segment(4, 6, (0, 4)), Segment(6, 9, (0, 4)), Segment(9, 11), Segment(11, 12, (9, 11))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("segments", [GROUPS, GROUPS[:3] + [Segment(9, 12)], [Segment(0, 12)]])
def test_torch_takes_the_calls_of_its_kernel(dtype: torch.dtype, segments: list[Segment]) -> None:
    """Without memory: torch checks how its operators are called, and knows the shapes that come out."""
    with device.without_memory():
        leaves = [torch.empty(12, h, 80, dtype=dtype, requires_grad=True) for h in (4, 2, 2)]
        out = FlashPlan(segments, True, TorchFlash()).attend(*leaves)
        out.sum().backward()
    assert out.shape == (12, 4, 80) and out.dtype == dtype
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and leaf.grad.dtype == dtype


def test_the_way_goes_by_device_type_and_head_size_and_only_that_way_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "capability", lambda: (7, 5))
    assert not TorchFlash.takes(SimpleNamespace(is_cuda=True, dtype=torch.float16, shape=(9, 2, 80)))  # type: ignore[arg-type]
    monkeypatch.setattr(device, "capability", lambda: (8, 0))
    taken = [
        (cuda, dtype, size)
        for cuda in (False, True)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        for size in (12, 80, 128)
        if TorchFlash.takes(SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(9, 2, size)))  # type: ignore[arg-type]
    ]
    assert taken == [(True, dtype, size) for dtype in (torch.bfloat16, torch.float16) for size in (80, 128)]
    plan = AttentionPlan(GROUPS)
    given = tensors(GROUPS, 4, 2, torch.bfloat16)
    padded = plan.attend(1, *given)
    assert "_flash" not in vars(plan) and "_padded" in vars(plan)
    monkeypatch.setattr(attention, "TorchFlash", PlainFlash)
    plan = AttentionPlan(GROUPS)
    assert torch.allclose(plan.attend(1, *given), padded, rtol=0, atol=2**-6)
    assert "_flash" in vars(plan) and "_padded" not in vars(plan)


def test_queries_of_one_token_are_not_named_so() -> None:
    plan = FlashPlan([Segment(0, 1), Segment(1, 2, (0, 1)), Segment(2, 3)], True, PlainFlash())
    assert plan._own is not None and plan._behind is not None
    assert (plan._own.max_q, plan._own.max_k, plan._behind.over.max_q) == (2, 1, 2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("flash") / "model", seed=7)


@pytest.mark.parametrize("recompute", [None, RecomputeConfig(granularity="selective", tower=True)], ids=["", "again"])
def test_a_whole_model_goes_the_same_way(
    directory: Path, monkeypatch: pytest.MonkeyPatch, recompute: RecomputeConfig | None
) -> None:
    """Tower, prefill, and the gradients of packed groups, with PlainFlash in the place of torch's kernel."""

    def numbers() -> tuple[list[list[int]], list[torch.Tensor]]:
        policy = work.load_policy(directory, mesh, recompute=recompute)
        rows = work.generate(policy, mixed_prompts(directory), greedy=False)
        policy.wrap_for_training()
        advantages = np.random.default_rng(0).standard_normal((len(rows), work.GENERATIONS)).astype(np.float32)
        groups = [Group(p, r, (), a) for p, r, a in zip(mixed_prompts(directory), rows, advantages, strict=True)]
        work.still_update(policy, None, work.LARGE)(groups, 0.0)
        ids = [c.token_ids.tolist() for row in rows for c in row]
        found = [torch.from_numpy(c.logprobs) for row in rows for c in row]
        return ids, found + [p.main_grad.clone() for p in policy.parameters()]  # type: ignore[attr-defined]

    with ranks.alone() as mesh:
        before = numbers()
        monkeypatch.setattr(attention, "TorchFlash", PlainFlash)
        after = numbers()
    assert after[0] == before[0] and all(x.any() for x in before[1])
    for a, b in zip(after[1], before[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
