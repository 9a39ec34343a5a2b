"""Vocabulary-parallel log-probs with a backward of our own, in chunks.

log p(label) = logit[label] - log sum_v exp(logit[v]) over the vocabulary less the banned tokens. Each rank of the
tensor-parallel group holds some rows of the output layer; two small all-reduces per chunk join them. Logits of more
than one chunk never exist: backward computes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

CHUNK_BYTES = 64 << 20  # fp32 logits of one chunk


class Vocabulary:
    """This rank's part of the vocabulary, and which of its tokens can never be produced."""

    def __init__(self, rows: int, size: int, banned: Sequence[int], group: dist.ProcessGroup, where: torch.device):
        """`rows` of this rank, `size` of the true vocabulary without padding, `banned` token ids."""
        self.group = group
        self.rows = rows
        self.start = rows * dist.get_rank(group)
        self.parallel = dist.get_world_size(group) > 1
        ids = torch.arange(self.start, self.start + rows)
        forbidden = torch.isin(ids, torch.tensor(sorted(banned), dtype=torch.int64)) | (ids >= size)
        self.forbidden = forbidden.nonzero()[:, 0].to(where)  # columns

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return this rank's fp32 logits [n, rows], -inf where a token is banned."""
        logits = (hidden @ weight.t()).float()
        return logits.index_fill_(1, self.forbidden, float("-inf"))

    def log_normaliser(self, logits: torch.Tensor, *weighted: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return log sum exp over the whole vocabulary [n] and, beside it, the all-reduced sums of `weighted` [n]."""
        top = logits.max(dim=-1).values
        if self.parallel:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        sums = torch.stack([torch.exp(logits - top[:, None]).sum(-1), *weighted])
        if self.parallel:
            dist.all_reduce(sums, group=self.group)
        return top + sums[0].log(), list(sums[1:])

    def pick(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the logit of each label where this rank owns it, else 0. [n]"""
        local, owned = self.own(labels)
        return torch.where(owned, logits.gather(1, local[:, None])[:, 0], 0.0)

    def own(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return local row numbers (clamped) and whether this rank owns them."""
        local = labels - self.start
        owned = (local >= 0) & (local < self.rows)
        return local.clamp(0, self.rows - 1), owned


def _chunks(n: int, rows: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // (4 * rows))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = hidden.shape[0]
        logprobs, normaliser, entropy = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(3))
        for part in _chunks(n, weight.shape[0]):
            logits = vocabulary.logits(hidden[part], weight)
            log_z, (picked,) = vocabulary.log_normaliser(logits, vocabulary.pick(logits, labels[part]))
            logprobs[part], normaliser[part] = picked - log_z, log_z
            p = torch.exp(logits - log_z[:, None])
            entropy[part] = -(p * (logits - log_z[:, None]).masked_fill_(p == 0, 0.0)).sum(-1)
        if vocabulary.parallel:
            dist.all_reduce(entropy, group=vocabulary.group)
        ctx.save_for_backward(hidden, weight, labels, normaliser)
        ctx.vocabulary = vocabulary
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        hidden, weight, labels, normaliser = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        local, owned = vocabulary.own(labels)
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            logits = vocabulary.logits(hidden[part], weight)
            d_logits = torch.exp(logits - normaliser[part, None]).neg_()
            d_logits.scatter_add_(1, local[part, None], owned[part, None].to(d_logits.dtype))
            d_logits = d_logits.mul_(grads[0][part, None]).to(hidden.dtype)
            d_hidden[part] = d_logits @ weight
            d_weight += d_logits.t() @ hidden[part]
        return d_hidden, d_weight.to(weight.dtype), None, None


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of labels and entropies of their distributions, at T=1 over the vocabulary less the banned tokens.

    Args:
        hidden: [n, H], the same on every rank of the tensor-parallel group. Its gradient is this rank's part only:
            the caller's conjugate (see `models.vlm.gather_hidden`) sums it over the group.
        weight: [rows, H], this rank's rows of the output layer.
        labels: [n] token ids, none of them banned.
        vocabulary: this rank's part of the vocabulary.

    Returns:
        fp32 log-probs [n], differentiable, and fp32 entropies [n], not differentiable.
    """
    return _TokenLogprobs.apply(hidden, weight, labels, vocabulary)
