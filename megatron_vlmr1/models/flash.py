"""Flash attention over packed rows: nothing is padded or masked, and no prompt's keys are copied for a completion.

Two calls of a kernel that takes sequences of all lengths: every segment on its own keys; and all completions of a
prompt, as one sequence of queries, on the prompt's keys, all of which they see. Their outputs o and log-sum-exps l are
joined as attention in blocks is (arXiv 2307.08691, section 3.1; 2310.01889): with w = sigmoid(l2 - l1), the output is
(1 - w) o1 + w o2, and its log-sum-exp is log(exp l1 + exp l2). Backward makes probabilities again from scores as
exp(score - l). Given the joint output and log-sum-exp, it returns for each call its share of the gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from megatron_vlmr1.models.rows import Rows, add, put, rows, take
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.runtime import device

_CAPABILITY = (8, 0)
State = tuple[torch.Tensor, ...]  # what a kernel wants back in backward
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of queries, keys and values


@dataclass(frozen=True)
class Sequences:
    """n sequences of queries, one after another, and the keys of each, one after another as well."""

    ends_q: torch.Tensor  # [n + 1], int32, from 0
    ends_k: torch.Tensor  # [n + 1], int32, from 0
    max_q: int  # no sequence is longer
    max_k: int
    causal: bool  # only where queries and keys are equally many


class Kernel(Protocol):
    """Attention of sequences: queries [Tq, H, D], keys and values [Tk, Hkv, D] with Hkv dividing H."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, over: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, State]:
        """Return softmax(q k^T / sqrt(D)) v [Tq, H, D], the log-sum-exp of each row of scores [H, Tq], and a state."""
        ...

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
        """Return these keys' share of the gradients, where `out` and `lse` may be over further keys too."""
        ...


class TorchFlash:
    """FlashAttention as torch brings it: CUDA from Ampere on, half precision, head sizes that are multiples of 8."""

    @staticmethod
    def takes(q: torch.Tensor) -> bool:
        """Whether queries [T, H, D] are such."""
        fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0
        return fits and device.capability() >= _CAPABILITY

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, over: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, State]:
        """See `Kernel`; the state is that of dropout, which is not used but must be there."""
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, over.ends_q, over.ends_k, over.max_q, over.max_k, 0.0, over.causal, return_debug_mask=False
        )
        assert lse.shape == (q.shape[1], q.shape[0]), f"log-sum-exps of torch {torch.__version__}: {lse.shape}"
        return out, lse, (seed, offset)

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
        """See `Kernel`."""
        of_queries, of_keys, of_values = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, over.ends_q, over.ends_k, over.max_q, over.max_k, 0.0, over.causal, *state
        )
        return of_queries, of_keys, of_values


@dataclass(frozen=True)
class _Behind:
    """Completions' queries on their prompts' keys; rows of the packed row."""

    over: Sequences
    queries: Rows
    keys: Rows

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> _Behind | None:
        """Look at segments in order; None where none has a prefix."""
        groups: dict[tuple[int, int], list[Segment]] = defaultdict(list)
        for s in segments:
            if s.prefix and s.prefix[1] > s.prefix[0]:
                groups[s.prefix].append(s)
        if not groups:
            return None
        prompts = sorted(groups)
        assert all(a[1] <= b[0] for a, b in zip(prompts, prompts[1:], strict=False)), "prompts overlap"
        queries = [np.concatenate([np.arange(s.start, s.stop) for s in groups[prompt]]) for prompt in prompts]
        keys = [np.arange(*prompt) for prompt in prompts]
        over = _sequences([each.size for each in queries], [each.size for each in keys], causal=False)
        return cls(over, rows(np.concatenate(queries)), rows(np.concatenate(keys)))


class FlashPlan:
    """What a packed row's segments ask of a kernel."""

    def __init__(self, segments: Sequence[Segment], causal: bool, kernel: Kernel) -> None:
        """Segments that are not empty must lie one after another from 0, in any order."""
        own = sorted((s for s in segments if s.stop > s.start), key=lambda s: s.start)
        lengths = [s.stop - s.start for s in own]
        self._tokens = sum(lengths)
        starts = np.cumsum([0, *lengths])[:-1]
        assert [s.start for s in own] == starts.tolist(), "segments leave gaps or overlap"
        self._own = _sequences(lengths, lengths, causal) if own else None
        self._behind = _Behind.of(own)
        self._kernel = kernel

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Map q [T, H, D], k and v [T, Hkv, D] to [T, H, D]. Kept for backward: these, and log-sum-exps [H, T]."""
        if self._own is None:
            return q
        assert q.shape[0] == self._tokens
        out: torch.Tensor = _Attention.apply(q, k, v, self)
        return out

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, State]:
        """Return output, log-sum-exp, and the states of one call or of two."""
        assert self._own is not None
        out, lse, states = self._kernel.forward(q, k, v, self._own)
        if (b := self._behind) is None:
            return out, lse, states
        out2, lse2, more = self._kernel.forward(take(q, b.queries), take(k, b.keys), take(v, b.keys), b.over)
        lse1 = take(lse, b.queries, 1)
        share = torch.sigmoid(lse2 - lse1).t()[:, :, None]  # of the prompt, in fp32, and so is what it multiplies
        put(out, b.queries, torch.addcmul(take(out, b.queries) * (1 - share), out2, share))
        put(lse, b.queries, torch.logaddexp(lse1, lse2), 1)
        return out, lse, states + more

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        states: State,
    ) -> Gradients:
        """Return gradients from that of the output, and what forward took and returned."""
        assert self._own is not None
        each = len(states) if self._behind is None else len(states) // 2
        of_queries, of_keys, of_values = self._kernel.backward(grad, q, k, v, out, lse, self._own, states[:each])
        if b := self._behind:
            upstream, asking, joint = (take(x, b.queries) for x in (grad, q, out))
            asked, values = take(k, b.keys), take(v, b.keys)
            lse = take(lse, b.queries, 1).contiguous()
            more = self._kernel.backward(upstream, asking, asked, values, joint, lse, b.over, states[each:])
            add(of_queries, b.queries, more[0])
            add(of_keys, b.keys, more[1])
            add(of_values, b.keys, more[2])
        return of_queries, of_keys, of_values


def _sequences(queries: Sequence[int], keys: Sequence[int], causal: bool) -> Sequences:
    ends = [torch.from_numpy(np.cumsum([0, *each], dtype=np.int32)).to(device.device()) for each in (queries, keys)]
    # Of single queries torch's kernel makes a case of its own, with rows in another order.
    return Sequences(ends[0], ends[1], max(2, *queries), max(1, *keys), causal)


class _Attention(torch.autograd.Function):
    """Both calls as one: what is kept is the joint output, not that of each."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: FlashPlan) -> torch.Tensor:
        out, lse, states = plan.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse, *states)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, out, lse, *states = ctx.saved_tensors
        of_queries, of_keys, of_values = ctx.plan.backward(grads[0].contiguous(), q, k, v, out, lse, tuple(states))
        return of_queries, of_keys, of_values, None
