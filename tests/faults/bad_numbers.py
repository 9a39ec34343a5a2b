"""`vlmr1` with bad numbers on one rank at some steps, counted from 0.

Called as ``bad_numbers.py nan|flip RANK STEP,STEP… WORDS…``: a completion's log-probs are not numbers, as from a faulty
kernel; or a bit of the last norm flips right after the optimizer's step.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_vlmr1.cli.main import main


def spoil(rank: str, steps: set[int]) -> None:
    """Let the rollouts of these steps on that rank have a completion with a NaN."""
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
    """Flip the lowest bit of a weight after these steps on that rank."""
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


if __name__ == "__main__":
    {"nan": spoil, "flip": flip}[sys.argv[1]](sys.argv[2], set(map(int, sys.argv[3].split(","))))
    sys.exit(main(sys.argv[4:]))
