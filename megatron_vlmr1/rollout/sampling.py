"""Sampling from vocabulary-parallel logits with random numbers that depend on the token's identity only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_vlmr1.models.logprobs import Vocabulary
from megatron_vlmr1.types import IntArray


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    greedy: bool = False
    seed: int = 0


def uniforms(seed: int, prompts: IntArray, completions: IntArray, position: int) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) for each (seed, prompt, completion, position), whatever else is in the batch.

    Args:
        seed: of the run.
        prompts: [n] prompt ids.
        completions: [n] completion numbers within their groups.
        position: of the token within its completion.
    """
    state = np.full(prompts.shape, seed, dtype=np.uint64)
    for word in (prompts, completions, np.full_like(prompts, position)):
        state = _mix(state ^ _mix(word.astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose outputs pass as random."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def choose(
    logits: torch.Tensor, vocabulary: Vocabulary, sampling: Sampling, random: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a row.

    Args:
        logits: fp32 [n, vocabulary / tp], this rank's part, -inf where banned.
        vocabulary: this rank's part of the vocabulary.
        sampling: how to choose.
        random: [n] float64 numbers in [0, 1); None when greedy.

    Returns:
        Token ids [n], the same on all ranks, and their log-probs [n] at T=1.
    """
    if random is None:
        tokens = _largest(logits, vocabulary)
    else:
        tokens = _draw(logits / sampling.temperature, vocabulary, random)
    log_z, (picked,) = vocabulary.log_normaliser(logits, vocabulary.pick(logits, tokens))
    return tokens, picked - log_z


def _gathered(values: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Return [tp, n]: the values of all ranks."""
    if not vocabulary.parallel:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(vocabulary.group))]
    dist.all_gather(parts, values.contiguous(), group=vocabulary.group)
    return torch.stack(parts)


def _from_owner(local: torch.Tensor, owner: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Return the owning rank's choice [n] as global token ids. `owner` [n] is the rank number."""
    rank = dist.get_rank(vocabulary.group)
    tokens = torch.where(owner == rank, local + vocabulary.start, 0)
    if vocabulary.parallel:
        dist.all_reduce(tokens, group=vocabulary.group)
    return tokens


def _largest(logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    best, local = logits.max(dim=-1)
    return _from_owner(local, _gathered(best, vocabulary).max(dim=0).indices, vocabulary)


def _draw(logits: torch.Tensor, vocabulary: Vocabulary, random: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution, laid out over the ranks in order of token ids."""
    top = _gathered(logits.max(dim=-1).values, vocabulary).max(dim=0).values
    cumulative = torch.exp(logits - top[:, None]).double().cumsum(-1)
    sums = _gathered(cumulative[:, -1], vocabulary)  # [tp, n]
    ends = sums.cumsum(0)
    target = random * ends[-1]
    # Rounding could push the target past the last token that has any probability.
    owner = (ends <= target).sum(0)
    owner = torch.minimum(owner, sums.shape[0] - 1 - (sums > 0).flip(0).int().argmax(0))
    rank = dist.get_rank(vocabulary.group)
    # Not ends - sums: rounded, it could put the target before this rank's first token, which may be banned.
    within = target - (ends[rank - 1] if rank else 0.0)
    within = torch.minimum(within, cumulative[:, -1] * (1 - 1e-15))
    local = torch.searchsorted(cumulative, within[:, None], right=True)[:, 0]
    return _from_owner(local.clamp(max=logits.shape[1] - 1), owner, vocabulary)
