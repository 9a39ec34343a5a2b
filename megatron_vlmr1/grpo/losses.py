"""Per-token losses, and weights to add them up with: pure functions of log-probs and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Tokens:
    """Completion tokens of one micro-batch. All tokens of a completion are in the same micro-batch."""

    logprobs: torch.Tensor  # [n], of the current policy, differentiable
    old_logprobs: torch.Tensor  # [n], of the policy before the first optimizer step on these completions
    advantages: torch.Tensor  # [n], of the completion each token belongs to
    completions: torch.Tensor  # [n] int64, number of that completion
    lengths: torch.Tensor  # [completions], tokens of each completion of this rank's step


class Surrogate(NamedTuple):
    """What a loss says of each token."""

    loss: torch.Tensor  # [n], differentiable
    ratio: torch.Tensor  # [n], before clipping
    clipped: torch.Tensor  # [n] bool


def clipped_surrogate(tokens: Tokens, epsilon_low: float, epsilon_high: float) -> Surrogate:
    """Return -min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A), rho = p / p_old of each token.

    Source: PPO; GRPO, arXiv 2402.03300, eq. 3; DAPO, arXiv 2503.14476, eq. 8 (epsilon_high > epsilon_low).
    At rho = 1 its gradient is REINFORCE's, -A grad log p. A token is clipped when its gradient is zero for that.
    """
    ratio = torch.exp(tokens.logprobs - tokens.old_logprobs)
    return _clipped(ratio, tokens.advantages, epsilon_low, epsilon_high)


def sequence_surrogate(tokens: Tokens, epsilon_low: float, epsilon_high: float) -> Surrogate:
    """Return the clipped surrogate of s = (p(completion) / p_old(completion)) ** (1 / length), for each of its tokens.

    Source: GSPO, arXiv 2507.18071, eq. 5 and 7. A completion is clipped as a whole: its tokens count as clipped, and
    their gradient is zero.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    sums = torch.zeros_like(tokens.lengths).index_add(0, tokens.completions, log_ratio)
    ratio = torch.exp(sums / tokens.lengths)[tokens.completions]
    return _clipped(ratio, tokens.advantages, epsilon_low, epsilon_high)


def clipped_importance(tokens: Tokens, epsilon_low: float, epsilon_high: float) -> Surrogate:
    """Return -clip(rho, 1 - epsilon_low, 1 + epsilon_high) A log p, without a gradient through the clipped ratio.

    Source: CISPO, arXiv 2506.13585, eq. 4 and 5. A token is clipped when its weight is not its ratio; its gradient is
    bounded but never zero for that, which is the point of the method. Without an advantage nothing is clipped.
    """
    ratio = torch.exp(tokens.logprobs.detach() - tokens.old_logprobs)
    weight = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    return Surrogate(-weight * tokens.advantages * tokens.logprobs, ratio, (weight != ratio) & (tokens.advantages != 0))


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float) -> Surrogate:
    bounded = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    clipped = ((ratio < 1.0 - epsilon_low) & (advantages < 0)) | ((ratio > 1.0 + epsilon_high) & (advantages > 0))
    return Surrogate(loss, ratio.detach(), clipped)


def k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Return exp(ref - pi) - (ref - pi) - 1 per token: an unbiased, never negative estimate of KL(pi || ref).

    Source: J. Schulman, "Approximating KL divergence" (k3); arXiv 2402.03300, eq. 4.
    """
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1.0


def truncated_importance(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return min(p_old / p_rollout, cap) per token, without gradient, and where the cap was taken.

    Source: F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025. Both
    policies have the same weights; the ratio differs from one because two programs computed it, and where p_rollout is
    of a sampler that changes the distribution (temperature, top_p and the like).
    """
    ratio = torch.exp(old_logprobs.detach() - rollout_logprobs)
    return ratio.clamp(max=cap), ratio > cap


@dataclass(frozen=True)
class Counts:
    """The true size of a step, over all data-parallel ranks."""

    completions: int
    tokens: int
    max_new_tokens: int


def mean_of_means(lengths: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Weigh a token of each completion [n] by 1 / (length completions): the mean over tokens, then over completions."""
    return 1.0 / (lengths * counts.completions)


def token_mean(lengths: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Weigh every token of the step alike, by 1 / tokens."""
    return torch.full_like(lengths, 1.0 / counts.tokens)


def constant_mean(lengths: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Weigh every token by 1 / (completions max_new_tokens): a completion's sum, in units that no length changes."""
    return torch.full_like(lengths, 1.0 / (counts.completions * counts.max_new_tokens))
