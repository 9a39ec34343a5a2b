"""A prompt that is too long, on one of two data-parallel ranks: left out with a ledger row, or both ranks end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlmr1.cli.main import main
from megatron_vlmr1.data.scenes import write_split
from tests import jobs

SAMPLES, LONG = 7, 4  # an odd number: evaluation has a round that only rank 0 takes part in
LIMIT = 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    jsonl = write_split(folder, "train", SAMPLES)
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    rows[LONG]["conversations"][0]["value"] += " please" * 200
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(folder / "shards"), "--jsonl", str(jsonl), "--images", str(folder / "images")]
    assert main(["shards", "build", *words]) == 0
    return folder / "shards"


def config(folder: Path, shards: Path, policy: str) -> Path:
    return jobs.write_config(
        folder,
        shards,
        method="sft",
        data={"max_prompt_tokens": LIMIT, "long_prompts": policy, "evaluate": {"val": str(shards)}},
        parallel={"tensor_model_parallel_size": 1},
        # 8 positions: the epoch of 7 samples and one more
        train={"steps": 4, "prompts_per_step": 2, "save_every": 0},
        evaluate={"batch_prompts": 1, "sampled": False},
    )


def assert_one_line(code: int, output: str) -> None:
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if "longer than" in line]
    assert f"00000000{LONG}: prompt of" in line and f"longer than data.max_prompt_tokens={LIMIT}" in line
    assert "data.long_prompts=drop leaves it out" in line and "Traceback" not in output


@pytest.mark.timeout(200)
def test_error_ends_training_and_evaluation_on_all_ranks(tmp_path: Path, shards: Path) -> None:
    made = config(tmp_path, shards, "error")
    assert_one_line(*jobs.run("train", made, "--nproc", 2, timeout=90))
    assert not (tmp_path / "run" / "ledger").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    assert_one_line(*jobs.run_forked(2, "evaluate", made, "--label", "x"))
    assert not (tmp_path / "run" / "evaluations").exists()


@pytest.mark.timeout(200)
def test_drop_leaves_it_out_and_writes_it_down(tmp_path: Path, shards: Path) -> None:
    made = config(tmp_path, shards, "drop")
    code, output = jobs.run_forked(2, "train", made)
    assert code == 0, output
    rows = [json.loads(line) for path in tmp_path.glob("run/ledger/*.jsonl") for line in path.read_text().splitlines()]
    # Whether the eighth position draws the long sample again is the order's affair.
    assert len(rows) in (1, 2) and {row["key"] for row in rows} == {f"00000000{LONG}"}
    assert all(row["shard"] == "shard-000000.tar" and "longer than" in row["reason"] for row in rows)
    code, output = jobs.run_forked(2, "evaluate", made, "--label", "x")
    assert code == 0, output
    figures = json.loads((tmp_path / "run" / "evaluations" / "x.json").read_text())["val"]
    assert (figures["samples"], figures["damaged"]) == (SAMPLES - 1, 1)
