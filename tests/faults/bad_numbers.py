"""`vlmr1` with completions whose log-probs are not numbers, as from a faulty kernel: at some steps, on one rank.

Called as ``bad_numbers.py RANK STEP,STEP… WORDS…``.
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


if __name__ == "__main__":
    spoil(sys.argv[1], set(map(int, sys.argv[2].split(","))))
    sys.exit(main(sys.argv[3:]))
