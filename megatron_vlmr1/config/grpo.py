"""The algorithm that turns rewards into updates."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from megatron_vlmr1.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

# Clip ranges (epsilon_low, epsilon_high) of the algorithms that need other ones than GRPO's.
_CLIP_RANGES = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}


class GrpoConfig(Section):
    """Group relative policy optimisation; the defaults are VLM-R1's (arXiv 2504.07615, section 3)."""

    algorithm: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"] = "grpo"
    """Advantage, loss and average, as `grpo/algorithms.py` lists them with their papers. All else is set apart:
    dr_grpo, dapo, gspo and cispo are published with beta 0, dapo with dynamic sampling and an overlong buffer."""
    beta: NonNegativeFloat = 0.04
    """Weight of the KL term; 0 needs no reference model."""
    epsilon_low: PositiveFloat = 0.2
    """How far below one the ratio counts. Empty: 0.2; gspo 0.0003; cispo 1.0, which is no bound."""
    epsilon_high: PositiveFloat = 0.2
    """How far above one the ratio counts. Empty: 0.2; dapo 0.28; gspo 0.0004; cispo 4.0 (the cap 5 of arXiv 2510.13786,
    its own paper names none)."""
    num_iterations: PositiveInt = 1
    """Optimizer steps on each batch of completions."""
    truncated_importance: PositiveFloat | None = None
    """Weigh each token's loss by min(p_train / p_rollout, this), which corrects a gap between the log-probs of the
    rollout and of training; empty switches it off."""
    dynamic_sampling_rounds: NonNegativeInt = 0
    """Train only on groups whose scores differ, and draw train.prompts_per_step further prompts until as many such
    groups are found, in at most so many rounds a step, the first included; 0 trains on every group of one round."""
    overlong_buffer_tokens: NonNegativeInt = 0
    """A completion's score falls linearly by up to 1 over the last so many of rollout.max_new_tokens; 0 never."""

    @model_validator(mode="before")
    @classmethod
    def _clip_range_of_the_algorithm(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        empty = {key for key in ("epsilon_low", "epsilon_high") if raw.get(key) is None}
        given = {key: value for key, value in raw.items() if key not in empty}
        own = _CLIP_RANGES.get(str(raw.get("algorithm")))
        return given if own is None else {"epsilon_low": own[0], "epsilon_high": own[1], **given}
