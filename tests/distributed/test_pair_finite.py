"""Gradients that are not finite on one rank: all ranks skip the step together, and the third time they stop."""

from __future__ import annotations

import json
import math

import pytest


@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp2_vp2", "dp2"])
def test_all_ranks_agree(pair_results, layout):
    seen = [json.loads((pair_results / f"finite_{layout}_{rank}.json").read_text()) for rank in range(2)]
    for one in seen:
        assert one["verdicts"] == [True, False, False]  # clean; a NaN on rank 0 only; on rank 1 only
        assert [m["train/skipped"] for m in one["metrics"]] == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
        assert [math.isnan(m["train/grad_norm"]) for m in one["metrics"]] == [False, True, True, False, True, True]
        assert one["changed"] == [one["parameters"], 0, 0, one["parameters"], 0, 0]
        assert (one["code"], one["same"]) == (17, True)
        assert "not finite" in one["reason"]
    assert seen[0]["metrics"][3]["train/grad_norm"] == seen[1]["metrics"][3]["train/grad_norm"] > 0
