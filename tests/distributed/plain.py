"""What transformers and plain autograd say: one sequence at a time, nothing packed, nothing parallel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.data.images import pixel_values
from megatron_vlmr1.models.families import published_name
from megatron_vlmr1.models.families.qwen2_5_vl import ALIASES
from megatron_vlmr1.types import Group, IntArray, Prompt
from tests.checkpoints import banned_ids, plain_model

Tensors = dict[str, torch.Tensor]
Table = dict[tuple[int, int], torch.Tensor]  # log-probs [L] by group and completion


def inputs(model: Any, prompt: Prompt, more: IntArray | Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """Return transformers' inputs for a prompt and what follows it; it works out the positions by itself."""
    ids = torch.tensor([[*prompt.token_ids.tolist(), *map(int, more)]])
    out = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    if prompt.images:
        pixels = torch.from_numpy(np.concatenate([pixel_values(image) for image in prompt.images]))
        out["pixel_values"] = pixels.to(model.dtype)
        out["image_grid_thw"] = torch.tensor([image.grid_thw for image in prompt.images])
    return out


def logits(model: Any, prompt: Prompt, more: IntArray | Sequence[int] = ()) -> torch.Tensor:
    """Return [T, vocabulary]."""
    return model(**inputs(model, prompt, more), use_cache=False).logits[0]


def distributions(model: Any, prompt: Prompt, completion: IntArray, banned: Sequence[int]) -> torch.Tensor:
    """Return the log-probs [L, vocabulary] that each token of a completion was chosen from."""
    scores = logits(model, prompt, completion)[len(prompt.token_ids) - 1 : -1]
    forbidden = torch.zeros(scores.shape[1], dtype=torch.bool)
    forbidden[list(banned)] = True
    return torch.log_softmax(scores.masked_fill(forbidden, float("-inf")), dim=-1)


def logprobs(model: Any, prompt: Prompt, completion: IntArray, banned: Sequence[int]) -> torch.Tensor:
    """Return the log-probs [L] of a completion."""
    table = distributions(model, prompt, completion, banned)
    return table.gather(1, torch.from_numpy(completion)[:, None])[:, 0]


def grpo_loss(
    model: Any,
    reference: Any | None,
    groups: Sequence[Group],
    banned: Sequence[int],
    beta: float = 0.04,
    old: dict[tuple[int, int], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a step, and its KL: the mean over completions of each one's mean over tokens.

    Args:
        model: the policy.
        reference: of the KL term; None for none.
        groups: with advantages; a NaN takes no part.
        banned: token ids that are never sampled.
        beta: weight of the KL term.
        old: log-probs of the policy that generated, by group and completion; the present ones when None.
    """
    losses, kls = [], []
    for g, group in enumerate(groups):
        assert group.advantages is not None
        for i, completion in enumerate(group.completions):
            advantage = float(group.advantages[i])
            if np.isnan(advantage):
                continue
            new = logprobs(model, group.prompt, completion.token_ids, banned)
            ratio = torch.exp(new - (new.detach() if old is None else old[g, i]))
            per_token = -torch.min(ratio * advantage, torch.clip(ratio, 0.8, 1.2) * advantage)
            kl = torch.zeros_like(new)
            if reference is not None:
                with torch.no_grad():
                    fixed = logprobs(reference, group.prompt, completion.token_ids, banned)
                kl = torch.exp(fixed - new) - (fixed - new) - 1
            losses.append((per_token + beta * kl).mean())
            kls.append(kl.detach().mean())
    return torch.stack(losses).mean(), torch.stack(kls).mean()


@dataclass(frozen=True)
class Settings:
    """What an algorithm is run with."""

    algorithm: str
    low: float
    high: float
    beta: float = 0.0
    cap: float | None = None
    max_new_tokens: int = 1


def table(model: Any, groups: Sequence[Group], banned: Sequence[int]) -> Table:
    """Return the log-probs of every completion that has a score, if its group has another."""
    return {
        (g, i): logprobs(model, group.prompt, completion.token_ids, banned)
        for g, group in enumerate(groups)
        for i, completion in enumerate(group.completions)
        if group.scores[i].value is not None and sum(score.value is not None for score in group.scores) > 1
    }


def advantage(algorithm: str, group: Group, i: int) -> float:
    """Return completion `i`'s advantage from its group's scores."""
    scores = [score.value for score in group.scores if score.value is not None]
    mine = group.scores[i].value
    assert mine is not None
    if algorithm == "rloo":
        return mine - (sum(scores) - mine) / (len(scores) - 1)
    centred = mine - statistics.mean(scores)
    return centred if algorithm == "dr_grpo" else centred / (statistics.stdev(scores) + 1e-4)


def algorithm_loss(run: Settings, groups: Sequence[Group], new: Table, old: Table, fixed: Table) -> torch.Tensor:
    """Return the loss of a step from each algorithm's own equation, one completion after another.

    Args:
        run: the algorithm and its settings.
        groups: with scores, and the rollout's log-probs.
        new: of the policy, differentiable.
        old: of the policy before the first step.
        fixed: of the reference.
    """
    total = torch.zeros(())
    tokens = sum(len(row) for row in new.values())
    for (g, i), log_p in new.items():
        a = advantage(run.algorithm, groups[g], i)
        log_ratio = log_p - old[g, i]
        ratio = torch.exp(log_ratio.mean() if run.algorithm == "gspo" else log_ratio)
        bounded = torch.clip(ratio, 1 - run.low, 1 + run.high)
        if run.algorithm == "cispo":
            objective = bounded.detach() * a * log_p
        else:
            objective = torch.min(ratio * a, bounded * a).expand(len(log_p))
        if run.cap is not None:
            sampled = torch.from_numpy(groups[g].completions[i].logprobs)
            objective = objective * torch.exp(old[g, i] - sampled).clip(max=run.cap)
        cost = -objective + run.beta * (torch.exp(fixed[g, i] - log_p) - (fixed[g, i] - log_p) - 1)
        if run.algorithm in ("grpo", "gspo"):
            total = total + cost.mean() / len(new)
        elif run.algorithm in ("dapo", "cispo"):
            total = total + cost.sum() / tokens
        else:
            total = total + cost.sum() / (len(new) * run.max_new_tokens)
    return total


def gradients(model: Any, loss: torch.Tensor, keep: bool = False) -> Tensors:
    """Differentiate `loss`; gradients under the published names. `keep` its graph for another loss."""
    model.zero_grad()
    loss.backward(retain_graph=keep)
    return {published_name(name, ALIASES): p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@cache
def replayed_step(root: Path, which: str) -> tuple[Tensors, float, float]:
    """Gradients, loss and KL of transformers' model and plain autograd, sequence by sequence, on a saved rollout."""
    from tests.distributed import work

    model, reference = plain_model(root / which), plain_model(root / f"{which}_reference")
    groups = work.replayed_groups(root / "untied", root / "one" / "sampled_0.json")
    loss, kl = grpo_loss(model, reference, groups, banned_ids(root / which), beta=0.04)
    return gradients(model, loss), float(loss), float(kl)


def read(directory: Path) -> Tensors:
    """Read all tensors of a Hugging Face directory under their published names."""
    weights = HfWeights(directory)
    return {name: weights.tensor(name).clone() for name in weights.names()}


def flat(tensors: Tensors) -> torch.Tensor:
    """Return all numbers in one row, in order of names."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def worst(found: Tensors, expected: Tensors) -> tuple[float, str]:
    """Return the largest relative difference ||found - expected|| / ||expected|| of a tensor, and which it is."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(
        (float((found[n].double() - expected[n].double()).norm() / expected[n].double().norm()), n) for n in expected
    )


def within(record: Callable[[str, object], None], what: str, found: float, limit: float, detail: object = "") -> None:
    """Record a measured number, and fail where it is over its limit or not a number."""
    record(what, found)
    assert found <= limit, f"{what}: {found:.3e} > {limit:.0e} {detail}"
