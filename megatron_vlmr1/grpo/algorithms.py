"""The algorithms by name: what a group's scores become, each token's loss, and how tokens are averaged.

J is what the optimizer maximises, over completions i of the step's prompts and their tokens t; rho is p / p_old of a
token, A the advantage, N the number of completions, |o_i| their lengths; all counts are of the whole step. To -J each
token adds beta times its `losses.k3` under the same average.

========  ================================================================================  ========================
grpo      1/N sum_i 1/|o_i| sum_t min(rho A_i, clip(rho) A_i), A = (r - mean) / std         arXiv 2402.03300, eq. 3
dr_grpo   1/(N max_new_tokens) sum_i sum_t min(rho A_i, clip(rho) A_i), A = r - mean        arXiv 2503.20783
dapo      1/sum_i |o_i| sum_i sum_t min(rho A_i, clip(rho) A_i), A = (r - mean) / std       arXiv 2503.14476, eq. 8
gspo      1/N sum_i min(s_i A_i, clip(s_i) A_i), s = (p / p_old of all of o_i)^(1/|o_i|)    arXiv 2507.18071, eq. 5
cispo     1/sum_i |o_i| sum_i sum_t stop_gradient(clip(rho)) A_i log p                      arXiv 2506.13585, eq. 4
rloo      1/(N max_new_tokens) sum_i sum_t min(rho A_i, clip(rho) A_i), A = r - mean of     arXiv 2402.14740
          the other scores
========  ================================================================================  ========================

gspo and cispo take grpo's advantage. dapo and cispo are published as a mean over the tokens of each prompt's group;
here it is over those of the step, so that every token has the same weight. rloo is published for one optimizer step per
rollout, as REINFORCE on whole completions: the gradient above at rho = 1, times the constant max_new_tokens; its KL is
a term of the loss here and not of the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_vlmr1.grpo import losses
from megatron_vlmr1.grpo.advantages import centred_advantages, group_advantages, leave_one_out_advantages
from megatron_vlmr1.types import FloatArray


@dataclass(frozen=True)
class Algorithm:
    """One row of the table."""

    advantages: Callable[[FloatArray], FloatArray]  # [G] scores of a group -> [G]
    loss: Callable[[losses.Tokens, float, float], losses.Surrogate]  # tokens, epsilon_low, epsilon_high
    weights: Callable[[torch.Tensor, losses.Counts], torch.Tensor]  # [n] lengths -> [n] weights of a token


ALGORITHMS = {
    "grpo": Algorithm(group_advantages, losses.clipped_surrogate, losses.mean_of_means),
    "dr_grpo": Algorithm(centred_advantages, losses.clipped_surrogate, losses.constant_mean),
    "dapo": Algorithm(group_advantages, losses.clipped_surrogate, losses.token_mean),
    "gspo": Algorithm(group_advantages, losses.sequence_surrogate, losses.mean_of_means),
    "cispo": Algorithm(group_advantages, losses.clipped_importance, losses.token_mean),
    "rloo": Algorithm(leave_one_out_advantages, losses.clipped_surrogate, losses.constant_mean),
}
