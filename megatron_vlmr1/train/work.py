"""The work of a step: shared out evenly before the update, and counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlmr1.config import Config
from megatron_vlmr1.data.balance import Item, balanced
from megatron_vlmr1.data.costs import forward_language, forward_vision, update_cost
from megatron_vlmr1.data.packing import PackedGroup
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.train.run import Run
from megatron_vlmr1.types import Group

_TRAIN = 3  # forward passes that a forward and a backward pass are worth


def even_out(items: Sequence[Item], run: Run) -> list[Item]:
    """Return the groups that this data-parallel rank shall train on, of those that all ranks have."""
    if not run.cfg.train.balance:
        return list(items)
    policy = run.actor.policy
    costs = [update_cost(policy.shape, item.prompt, trained(item), policy.freeze_vision) for item in items]
    return balanced(items, costs, run.mesh)


def trained(item: Group | PackedGroup) -> list[int]:
    """Return the lengths of the completions that take part in the update: those that have an advantage."""
    if isinstance(item, PackedGroup):
        return [len(tokens) for tokens in item.completions]
    assert item.advantages is not None
    pairs = zip(item.completions, item.advantages, strict=True)
    return [len(completion.token_ids) for completion, advantage in pairs if np.isfinite(advantage)]


def work_metrics(
    drawn: Sequence[Group | PackedGroup], kept: Sequence[Group | PackedGroup], run: Run
) -> dict[str, float]:
    """Return ``perf/lm_flops`` and ``perf/vit_flops`` of the step over all ranks.

    Args:
        drawn: this rank's groups that were generated.
        kept: those of them that are trained on.
        run: whose shape and settings count.
    """
    language, vision = step_flops(drawn, kept, run.actor.policy.shape, run.cfg)
    return reduce.sums({"perf/lm_flops": language, "perf/vit_flops": vision}, run.mesh.is_model_leader)


def step_flops(
    drawn: Sequence[Group | PackedGroup], kept: Sequence[Group | PackedGroup], shape: VlmShape, cfg: Config
) -> tuple[int, int]:
    """Return the FLOPs of a step that generates `drawn` and trains on `kept`: (language model, vision tower).

    Counted are true lengths: generation (each prompt prefilled once, each token decoded once), the reference's pass,
    the pass for old log-probs, and for each optimizer step a forward and a backward pass. A tower in training runs on
    each unique image once for each set of weights that is asked, without gradients, and once in each optimizer step; a
    frozen one runs once. Not counted is what an implementation adds: padding, prompts of groups that are cut,
    activations computed again.
    """
    grpo = cfg.method == "grpo"
    generates = grpo and cfg.debug.replay_rollouts is None
    steps = 0 if cfg.debug.skip_update else cfg.grpo.num_iterations if grpo else 1
    reference, old = grpo and cfg.grpo.beta > 0 and steps > 0, steps > 1
    updated = [item for item in kept if trained(item)] if steps else []
    language = sum(forward_language(shape, item.prompt, trained(item)) for item in updated)
    language *= reference + old + _TRAIN * steps
    if generates:
        language += sum(forward_language(shape, item.prompt, _generated(item)) for item in drawn)
    tower = forward_vision(shape, [item.prompt for item in (drawn if generates else updated)])
    if cfg.model.freeze_vision:
        return language, tower
    in_update = forward_vision(shape, [item.prompt for item in updated])
    # Generation and the pass for old log-probs are of the same weights.
    asked = tower if generates else old * in_update
    return language, asked + (reference + _TRAIN * steps) * in_update


def _generated(item: Group | PackedGroup) -> list[int]:
    assert isinstance(item, Group)
    return [len(completion.token_ids) for completion in item.completions]
