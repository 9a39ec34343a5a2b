"""Bad numbers on one rank at some steps, counted from 0."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np


def spoil(rank: str, steps: set[int]) -> None:
    """Let a completion of these steps on that rank have log-probs that are no numbers, as from a faulty kernel."""
    from megatron_vlmr1.train import grpo

    original = grpo.rollout

    def rollout(run: Any, prompts: Any) -> Any:
        groups = original(run, prompts)
        if os.environ["RANK"] == rank and run.step in steps:
            first, *others = groups[0].completions
            logprobs = np.full_like(first.logprobs, np.nan)
            groups[0] = replace(
                groups[0], completions=(replace(first, logprobs=logprobs, drawn_logprobs=None), *others)
            )
        return groups

    grpo.rollout = rollout


def flip(rank: str, steps: set[int]) -> None:
    """Flip the lowest bit of a weight of the last norm right after these steps of the optimizer on that rank."""
    import torch

    from megatron_vlmr1.grpo.update import Updater

    original, taken = Updater.step, 0

    def step(self: Any, *args: Any) -> Any:
        nonlocal taken
        out = original(self, *args)
        if os.environ["RANK"] == rank and taken in steps:
            self.policy.chunks[-1].language.decoder.final_layernorm.weight.detach().view(torch.int32)[5] ^= 1
        taken += 1
        return out

    Updater.step = step
