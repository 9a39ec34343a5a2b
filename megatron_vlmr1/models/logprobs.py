"""Vocabulary-parallel log-probs with a backward of our own, in chunks.

log p(label) = logit[label] - log sum_v exp(logit[v]) over the vocabulary less the banned tokens. Each rank of the
tensor-parallel group holds some rows of the output layer; two small all-reduces join them. Logits of more than one tile
(some positions x some tokens) never exist: forward keeps a running maximum and running sums, as in online softmax
(Milakov, Gimelshein 2018, arXiv 1805.02867), and backward computes the tiles again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# Positions x tokens of one tile. On a CPU 2 MB of fp32 logits: they stay in the cache, and the allocator has them at
# hand. A GPU wants few and large kernels. The output layer and its gradient are read once for so many positions.
TILES = {"cpu": (1024, 512), "cuda": (4096, 8192)}
_BANNED = -1e30  # finite, so that 0 * logit is 0; its exponential is 0 beside any true logit


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
        self.forbidden = forbidden.nonzero()[:, 0].to(where)  # columns, rising
        self.columns: list[int] = self.forbidden.tolist()  # the same, on the host

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
        return logits.gather(1, local[:, None])[:, 0].masked_fill(~owned, 0.0)

    def own(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return local row numbers (clamped) and whether this rank owns them."""
        local = labels - self.start
        owned = (local >= 0) & (local < self.rows)
        return local.clamp(0, self.rows - 1), owned


def _blocks(n: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


class _Tiles:
    """The tiles of fp32 logits [positions, tokens] of one call."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary
    ) -> None:
        self.hidden, self.weight, self.vocabulary = hidden, weight, vocabulary
        local = labels - vocabulary.start
        self.local = torch.where((local >= 0) & (local < vocabulary.rows), local, -1)  # [n]
        positions, tokens = TILES[hidden.device.type]
        self.positions, self.tokens = _blocks(hidden.shape[0], positions), _blocks(weight.shape[0], tokens)

    def logits(self, at: slice, of: slice) -> torch.Tensor:
        """Return one tile, `_BANNED` where a token is banned."""
        logits = (self.hidden[at] @ self.weight[of].t()).float()
        first, last = (bisect_left(self.vocabulary.columns, edge) for edge in (of.start, of.stop))
        if first == last:
            return logits
        return logits.index_fill_(1, self.vocabulary.forbidden[first:last] - of.start, _BANNED)

    def label(self, at: slice, of: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the column of each position's label in the tile [positions, 1] (clamped), and whether it is there."""
        local = self.local[at, None]
        return (local - of.start).clamp(0, of.stop - of.start - 1), (local >= of.start) & (local < of.stop)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = _Tiles(hidden, weight, labels, vocabulary)
        top = torch.full((hidden.shape[0],), _BANNED, device=hidden.device)
        # Sums of exp(logit - top), of exp(logit - top) * (logit - top), and the label's logit.
        sums, weighted, picked = (torch.zeros_like(top) for _ in range(3))
        for at in tiles.positions:
            for of in tiles.tokens:
                logits = tiles.logits(at, of)
                column, inside = tiles.label(at, of)
                picked[at] += torch.where(inside, logits.gather(1, column), 0.0)[:, 0]
                higher = torch.maximum(top[at], logits.amax(dim=-1))
                _rescale(sums[at], weighted[at], top[at] - higher)
                top[at] = higher
                logits -= higher[:, None]
                p = torch.exp(logits)
                sums[at] += p.sum(-1)
                weighted[at] += p.mul_(logits).sum(-1)
        if vocabulary.parallel:
            highest = top.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=vocabulary.group)
            _rescale(sums, weighted, top - highest)
            joined = torch.stack((sums, weighted, picked))
            dist.all_reduce(joined, group=vocabulary.group)
            top, (sums, weighted, picked) = highest, joined.unbind()
        log_sums = sums.log()
        normaliser = top + log_sums
        ctx.save_for_backward(hidden, weight, labels, normaliser)
        ctx.vocabulary = vocabulary
        entropy = log_sums - weighted / sums
        ctx.mark_non_differentiable(entropy)
        return picked - normaliser, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        hidden, weight, labels, normaliser = ctx.saved_tensors
        tiles = _Tiles(hidden, weight, labels, ctx.vocabulary)
        d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for at in tiles.positions:
            upstream = grads[0][at, None]
            for of in tiles.tokens:
                d_logits = tiles.logits(at, of).sub_(normaliser[at, None]).exp_().mul_(-upstream)
                column, inside = tiles.label(at, of)
                d_logits.scatter_add_(1, column, torch.where(inside, upstream, 0.0))
                d_logits = d_logits.to(hidden.dtype)
                d_hidden[at] += d_logits @ weight[of]
                d_weight[of] += d_logits.t() @ hidden[at]
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None


def _rescale(sums: torch.Tensor, weighted: torch.Tensor, shift: torch.Tensor) -> None:
    """Turn sums of exp(x) and exp(x) * x into those of x + `shift` (not above 0), in place."""
    weighted += shift * sums
    factor = torch.exp(shift)
    weighted *= factor
    sums *= factor


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
