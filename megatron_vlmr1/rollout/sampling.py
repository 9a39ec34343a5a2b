"""Sampling from vocabulary-parallel logits with random numbers that depend on the token's identity only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_vlmr1.models.logprobs import Vocabulary
from megatron_vlmr1.rollout.filters import filtered
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import IntArray

_SMALL = 2048  # tokens whose running sum is taken at once
_LOWEST = -3e38  # in place of -inf, the largest logit of a rank that holds nothing but banned tokens
_BELOW_ONE = 1 - 1e-15  # a share of a sum that rounding does not bring up to the sum, after which banned tokens may lie
_BLOCK = 256  # of more: tokens whose probabilities are added up before any of them is looked at alone


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The filters are applied in the order of their fields, as transformers does."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    greedy: bool = False
    seed: int = 0
    repetition_penalty: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def filters(self) -> bool:
        """Whether whole rows of the vocabulary have to be looked at."""
        return (self.repetition_penalty, self.top_k, self.top_p, self.min_p) != (1.0, 0, 1.0, 0.0)

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens there were."""
        return self.repetition_penalty != 1.0

    @property
    def changed(self) -> bool:
        """Whether tokens are drawn from another distribution than the model's own."""
        return self.filters or self.temperature != 1.0


class Choice(NamedTuple):
    """One token a row."""

    tokens: torch.Tensor  # [n] int64, the same on all ranks of the tensor-parallel group
    logprobs: torch.Tensor  # [n] float64, at T=1 over the vocabulary less the banned tokens
    drawn_logprobs: torch.Tensor  # [n] float64, under the distribution that the token was drawn from

    def table(self) -> torch.Tensor:
        """Return [3, n] float64, in which token ids are exact."""
        return torch.stack((self.tokens.double(), self.logprobs, self.drawn_logprobs))


def streams(seed: int, prompts: IntArray, completions: IntArray) -> npt.NDArray[np.uint64]:
    """Return the state [n] of each completion's random numbers: a function of (seed, prompt id, number) only."""
    state = np.full(prompts.shape, seed, dtype=np.uint64)
    for word in (prompts, completions):
        state = _mix(state ^ _mix(word.astype(np.uint64)))
    return state


def draw(states: npt.NDArray[np.uint64], positions: IntArray) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for the token at each position [n] of the completions with these states [n]."""
    return (_mix(states ^ _mix(positions.astype(np.uint64))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose outputs pass as random."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seen_tokens(history: Sequence[IntArray], vocabulary: Vocabulary) -> torch.Tensor:
    """Return which of this rank's tokens [n, vocabulary / tp] occur in each row's history, on the device."""
    rows = np.repeat(np.arange(len(history)), [len(ids) for ids in history])
    local = np.concatenate(history) - vocabulary.start
    mine = (local >= 0) & (local < vocabulary.rows)
    seen = torch.zeros((len(history), vocabulary.rows), dtype=torch.bool, device=device.device())
    at = torch.from_numpy(np.stack((rows[mine], local[mine]))).to(seen.device)
    seen[at[0], at[1]] = True
    return seen


def choose(
    logits: torch.Tensor,
    vocabulary: Vocabulary,
    sampling: Sampling,
    random: torch.Tensor | None,
    seen: torch.Tensor | None = None,
) -> Choice:
    """Choose one token a row.

    Args:
        logits: fp32 [n, vocabulary / tp], this rank's part, -inf where banned.
        vocabulary: this rank's part of the vocabulary.
        sampling: how to choose.
        random: [n] float64 numbers in [0, 1); None when greedy.
        seen: bool [n, vocabulary / tp], the tokens that the repetition penalty is for; None where it is 1.
    """
    if sampling.filters:
        return _choose_filtered(logits, vocabulary, sampling, random, seen)
    if random is None:
        tokens, logprobs = _largest(logits, vocabulary)
        return Choice(tokens, logprobs, logprobs)
    if sampling.temperature == 1.0:
        tokens, logprobs = _draw(logits, vocabulary, random)
        return Choice(tokens, logprobs, logprobs)
    tokens, drawn = _draw(logits / sampling.temperature, vocabulary, random)
    log_z, (picked,) = vocabulary.log_normaliser(logits, vocabulary.pick(logits, tokens))
    return Choice(tokens, (picked - log_z).double(), drawn)


def _choose_filtered(
    logits: torch.Tensor,
    vocabulary: Vocabulary,
    sampling: Sampling,
    random: torch.Tensor | None,
    seen: torch.Tensor | None,
) -> Choice:
    """Bring whole rows together: which tokens are kept depends on all of them. Every rank then draws for itself."""
    whole = _side_by_side(logits, vocabulary)
    kept = filtered(
        whole,
        seen=None if seen is None else _side_by_side(seen, vocabulary),
        repetition_penalty=sampling.repetition_penalty,
        temperature=1.0 if random is None else sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    if random is None:
        tokens = kept.argmax(-1)
    else:
        p = _Masses(torch.exp(kept - kept.amax(-1, keepdim=True)))
        tokens = p.invert(random * p.reach)
    at = tokens[:, None]
    logprobs, drawn = ((x.gather(1, at)[:, 0] - torch.logsumexp(x, -1)).double() for x in (whole, kept))
    return Choice(tokens, logprobs, drawn)


def _gathered(values: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Return [tp, ...]: the values of all ranks."""
    if not vocabulary.parallel:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(vocabulary.group))]
    dist.all_gather(parts, values.contiguous(), group=vocabulary.group)
    return torch.stack(parts)


def _side_by_side(rows: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Return [n, vocabulary] of all ranks' [n, vocabulary / tp]."""
    return torch.cat(_gathered(rows, vocabulary).unbind(0), dim=-1) if vocabulary.parallel else rows


def _largest(logits: torch.Tensor, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest tokens [n] and their log-probs [n]."""
    best, local = logits.max(dim=-1)
    own = torch.exp(logits - best[:, None].clamp(min=_LOWEST)).sum(-1)
    table = _gathered(torch.stack((best.double(), own.double(), (local + vocabulary.start).double())), vocabulary)
    owner = table[:, 0].argmax(0)[None]
    top = table[:, 0].gather(0, owner)[0]
    total = (table[:, 1] * torch.exp(table[:, 0] - top)).sum(0)
    return table[:, 2].gather(0, owner)[0].long(), -total.log()


def _draw(logits: torch.Tensor, vocabulary: Vocabulary, random: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert the cumulative distribution, laid out over the ranks in order of token ids.

    Returns:
        Tokens [n] and their log-probs [n].
    """
    own_top = logits.amax(-1, keepdim=True)
    if not vocabulary.parallel:
        masses = torch.exp(logits - own_top)
        p = _Masses(masses)
        tokens = p.invert(random * p.reach)
        return tokens, (masses.gather(1, tokens[:, None])[:, 0] / p.total).log_()
    # A rank may hold nothing but banned tokens: its largest logit is -inf, and so its sum 0.
    p = _Masses(torch.exp(logits - own_top.clamp(min=_LOWEST)))
    table = _gathered(torch.stack((own_top[:, 0].double(), p.total)), vocabulary)  # [tp, 2, n]
    top = table[:, 0].max(0).values
    masses = table[:, 1] * torch.exp(table[:, 0] - top)  # [tp, n]
    ends = masses.cumsum(0)
    target = random * ends[-1]
    # Rounding could push the target past the last rank that has any probability.
    owner = torch.minimum((ends <= target).sum(0), masses.shape[0] - 1 - (masses > 0).flip(0).int().argmax(0))
    rank = dist.get_rank(vocabulary.group)
    # Not ends - masses: rounded, it could put the target before this rank's first token, which may be banned.
    within = (target - (ends[rank - 1] if rank else 0.0)) / masses[rank].clamp(min=1e-300)
    local = p.invert(within.clamp(0.0, 1.0) * p.reach)
    picked = logits.gather(1, local[:, None])[:, 0]
    both = torch.stack(((local + vocabulary.start).double(), picked.double())).masked_fill_(owner != rank, 0.0)
    dist.all_reduce(both, group=vocabulary.group)
    return both[0].long(), both[1] - top - ends[-1].log()


class _Masses:
    """Unnormalised probabilities p [n, v], added up in blocks where there are many."""

    def __init__(self, p: torch.Tensor) -> None:
        n, v = p.shape
        self._p = p
        if v <= _SMALL:
            self._running = p.cumsum(-1, dtype=torch.float64)
        else:
            whole = v // _BLOCK * _BLOCK
            blocks = p[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
            sums = torch.cat((blocks, p[:, whole:].sum(-1, keepdim=True)), dim=1)
            self._running = sums.cumsum(-1, dtype=torch.float64)
        self.total = self._running[:, -1]  # [n] float64
        self.reach = self.total * _BELOW_ONE

    def invert(self, target: torch.Tensor) -> torch.Tensor:
        """Return the first index [n] at which the running sum of p exceeds target [n] from 0 to `reach`, all float64.

        Never an index where p is 0, unless the whole row is.
        """
        index = _first_above(self._running, target)
        if self._p.shape[1] <= _SMALL:
            return index
        before = self._running.gather(1, (index - 1).clamp(min=0)[:, None])[:, 0].masked_fill(index == 0, 0.0)
        columns = index[:, None] * _BLOCK + torch.arange(_BLOCK, device=index.device)
        values = self._p.gather(1, columns.clamp(max=self._p.shape[1] - 1))
        values = values.masked_fill(columns >= self._p.shape[1], 0.0)
        running = values.cumsum(-1, dtype=torch.float64)
        # The block's own sum was rounded: its running sums may end a little lower.
        within = _first_above(running, torch.minimum(target - before, running[:, -1] * _BELOW_ONE))
        return (index * _BLOCK + within).clamp_(max=self._p.shape[1] - 1)


def _first_above(running: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return where running sums [n, k] first exceed target [n]."""
    return torch.searchsorted(running, target[:, None], right=True)[:, 0].clamp_(max=running.shape[1] - 1)
