"""Per-token losses: pure functions of log-probs."""

from __future__ import annotations

import torch


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return -min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) per token (PPO; arXiv 2402.03300, eq. 3).

    Args:
        logprobs: [n], of the current policy, differentiable.
        old_logprobs: [n], of the policy that generated.
        advantages: [n], of the completion each token belongs to.
        epsilon_low: how far below one the ratio counts.
        epsilon_high: how far above one the ratio counts.

    Returns:
        The loss [n], the ratio rho [n], and which tokens were truly clipped [n] (their gradient is zero).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    clipped = ((ratio < 1.0 - epsilon_low) & (advantages < 0)) | ((ratio > 1.0 + epsilon_high) & (advantages > 0))
    return loss, ratio.detach(), clipped


def k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Return exp(ref - pi) - (ref - pi) - 1 per token: an unbiased, never negative estimate of KL(pi || ref).

    Source: J. Schulman, "Approximating KL divergence" (k3); arXiv 2402.03300, eq. 4.
    """
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1.0
