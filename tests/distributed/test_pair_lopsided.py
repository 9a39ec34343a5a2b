"""Data-parallel ranks that have nothing to do join every collective and change no number."""

from __future__ import annotations

import json

import pytest

from tests.distributed import plain
from tests.distributed.plain import within


@pytest.mark.parametrize("layout", ["dp2", "pp2", "pp2_vp2", "tp2_sp"])
def test_a_rank_without_groups(pair_results, layout, record_property):
    from tests.distributed import work

    expected = plain.read(pair_results / "one" / f"gradients_untied_{work.LARGE}")
    difference, name = plain.worst(plain.read(pair_results / f"lopsided_{layout}"), expected)
    within(record_property, f"gradients, {layout}", difference, 1e-5, name)
    seen = [json.loads((pair_results / f"lopsided_{layout}_{rank}.json").read_text()) for rank in range(2)]
    alone = json.loads((pair_results / "one" / f"gradients_untied_{work.LARGE}.json").read_text())
    for some, nothing in seen:
        assert some["train/tokens"] == alone["train/tokens"]
        assert some["grpo/kl"] == pytest.approx(alone["grpo/kl"], rel=1e-5)
        assert some["rollout/logprob_gap"] <= 1e-4
        assert (nothing["train/tokens"], nothing["train/skipped"]) == (0, 1) and "train/loss" not in nothing
