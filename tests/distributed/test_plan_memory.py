"""Predicted peaks of memory against those of real steps, in every phase, layout by layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_vlmr1.plan.memory import PHASES
from tests.distributed import ranks
from tools.bench.memory_cases import CASES, predicted
from tools.bench.plan_memory import TOLERANCE, compared, run_case

ON_ONE = ("tiny_one", "tiny_long_full", "tiny_offload")  # long: sequences and images
ON_TWO = ("tiny_tp2_sp", "tiny_pp2_vp2", "tiny_dp2", "tiny_always")
ON_FOUR = ("tiny_tp2_pp2",)
QUICK = (*ON_ONE, *ON_TWO, *ON_FOUR)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measure all cases: a job for each number of ranks."""
    from tests.distributed import work_plan_memory

    root = tmp_path_factory.mktemp("plan")
    for name in QUICK:
        (root / name).mkdir()
    for world, cases in ((1, ON_ONE), (2, ON_TWO), (4, ON_FOUR)):
        ranks.run(world, work_plan_memory.measured, root, cases=list(cases))
    return root


@pytest.mark.parametrize("name", QUICK)
def test_peaks_are_those_of_a_real_step(results, name, record_property):
    case = CASES[name]
    found = [json.loads((results / name / f"rank_{rank}.json").read_text()) for rank in range(case.world)]
    expected = predicted(case, results / name)
    for each in found:  # exactly
        parts = expected[each["stage"]].phases["save"]
        assert each["resident"]["weights"] == parts["weights"]
        assert each["resident"]["gradients"] == parts["gradients"]
        assert 0.99 <= each["resident"]["optimizer"] / parts["optimizer"] <= 1.0  # padding has no state
    rows = compared(name, expected, found)
    assert {row["phase"] for row in rows} >= set(PHASES)
    for row in rows:
        record_property(f"{row['phase']} of stage {row['stage']}", f"{row['error']:+.3f}")
        assert abs(row["error"]) <= TOLERANCE, row


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_peaks_of_all_other_cases(name):
    """A hundred million parameters among them."""
    for row in run_case(name, argparse.Namespace(explain=False)):
        assert abs(row["error"]) <= TOLERANCE, row
