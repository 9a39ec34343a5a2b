"""Decoding copies: the same completions from every layout, and weights that are bit for bit the policy's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmr1.rollout.reshard import Part, transfers
from tests.checkpoints import mixed_prompts, write_random_checkpoint
from tests.distributed import ranks

TRAINING = ("tp2", "pp2", "pp2_vp2", "tp2_sp")
DECODING = ("alone", "tensor", "pipeline")
CHECKPOINTS = ("untied", "tied", "one_kv_head", "odd")


@pytest.fixture(scope="module")
def root(checkpoints: Path) -> Path:
    write_random_checkpoint(checkpoints / "odd", seed=5, vocab_size=511, intermediate_size=95)  # padded on two ranks
    from tests.distributed import work_copies

    ranks.run(2, work_copies.everything, checkpoints)
    return checkpoints


@pytest.fixture(scope="module")
def alone(checkpoints: Path, root: Path) -> dict[str, list]:
    """Completions of one process, of the training weights themselves."""
    with ranks.alone() as mesh:
        from tests.distributed import work, work_copies

        out = {}
        for which in CHECKPOINTS:
            policy = work.load_policy(root / which, mesh)
            out[which] = work.engine(policy).generate(
                mixed_prompts(root / which), work.GENERATIONS, work_copies.SAMPLING
            )
    return out


@pytest.mark.parametrize("which", CHECKPOINTS)
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("training", TRAINING)
def test_copies(root, alone, training, decoding, which):
    seen = [json.loads((root / f"copy_{training}_{decoding}_{which}_{rank}.json").read_text()) for rank in range(2)]
    told = []
    for one in seen:
        assert all(one["same"]) and all(one["followed"]) and one["unchanged_without_notice"]
        assert one["bytes"] == [0, one["expected_bytes"], 0]
        for row, expected in zip(one["rows"], alone[which], strict=True):
            for (ids, logprobs, drawn, text, reason), c in zip(row, expected, strict=True):
                assert (ids, text, reason) == (c.token_ids.tolist(), c.text, c.finish_reason)
                assert np.abs(np.array(logprobs) - c.logprobs).max() <= 1e-5
                assert np.abs(np.array(drawn) - c.drawn_logprobs).max() <= 1e-5
        told += one["told"] if one["speaks"] else []
    assert sorted(map(tuple, told)) == [(i, j) for i in range(6) for j in range(4)]  # each once, by one rank
    assert [one["speaks"] for one in seen] == [True, decoding == "alone"]


def test_a_layout_that_does_not_fit(root):
    for rank in range(2):
        line = (root / f"copy_refused_{rank}.txt").read_text()
        assert "rollout.tensor_model_parallel_size=2 x rollout.pipeline_model_parallel_size=1 does not divide" in line


def test_the_plan_covers_every_row_once_and_asks_by_turns():
    whole = [Part("w", 0, 0, 12, 0, 0)]
    halves = [[Part("w", 0, 0, 6, 0, 0)], [Part("w", 0, 6, 12, 0, 0)]]
    plan = list(transfers(halves, [[Part("w", 0, 4, 8, 3, 10)], []]))
    assert [(t.source, t.source_offset, t.target_offset, t.size) for t in plan] == [(0, 4, 10, 2), (1, 0, 12, 2)]
    plan = list(transfers([whole, whole, [], []], [[], whole, whole, whole]))
    assert [(t.source, t.target) for t in plan] == [(1, 1), (0, 2), (1, 3)]
