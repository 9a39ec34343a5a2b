"""Completions end with their first stop token, which counts: the published mask, on tokens that were really sampled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_vlmr1.rollout.sampling import Sampling
from tests.checkpoints import mixed_prompts, write_random_checkpoint
from tests.distributed import ranks, work

CASES = json.loads((Path(__file__).parent / "data" / "grpo_cases.json").read_text())["cases"]


def mask(rows: list[list[int]], stop: int) -> list[list[int]]:
    """1 up to and including the first stop token of a row, 0 behind it."""
    return [[int(stop not in row[:i]) for i in range(len(row))] for row in rows]


def test_published():
    (case,) = (c for c in CASES if c["function"] == "completion_mask")
    assert mask(case["inputs"]["completion_ids"], case["inputs"]["eos_token_id"]) == case["expected"]


def test_a_completion_is_what_the_mask_keeps(tmp_path):
    """A token depends on the seed, the prompt, the completion and its position, not on what ends a completion."""
    with ranks.alone() as mesh:
        write_random_checkpoint(tmp_path / "policy")
        engine = work.engine(work.load_policy(tmp_path / "policy", mesh))
        prompts = mixed_prompts(tmp_path / "policy")[:3]

        def sampled(*stops: int) -> list[list[int]]:
            rows = engine.generate(prompts, 8, Sampling(12, frozenset(stops), seed=1))
            return [c.token_ids.tolist() for row in rows for c in row]

        whole = sampled()
        assert {len(row) for row in whole} == {12}
        stop = int(np.bincount(np.array(whole).flatten()).argmax())
        ended = sampled(stop)
    lengths = [sum(row) for row in mask(whole, stop)]
    expected = [row[:n] for row, n in zip(whole, lengths, strict=True)]
    assert ended == expected and 1 <= min(map(len, ended)) < 12
