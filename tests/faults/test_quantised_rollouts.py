"""Training on completions that two tensor-parallel ranks sampled in FP8: the gap is there, reported and weighed."""

from __future__ import annotations

import json
from pathlib import Path

from tests import jobs


def test_the_gap_is_reported_and_weighed(tmp_path: Path) -> None:
    path = jobs.write_config(
        tmp_path,
        jobs.build_shards(tmp_path, "train", 12),
        rollout={"quantization": "fp8"},
        grpo={"truncated_importance": 1.05},
        train={"steps": 3, "save_every": 0},
    )
    code, output = jobs.run("train", path, "--nproc", 2)
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert 1e-2 <= row["rollout/logprob_gap"] <= 2.0  # without, it is at most 1e-4
        assert 0.0 < row["grpo/tis_capped_frac"] < 0.5
        assert row["train/skipped"] == 0.0
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["adam"] == "torch"
