"""`vlmr1 evaluate` with a task of the user's own, whose reward runs in the reward processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlmr1.cli.main import main
from tests import jobs

TASK = """
from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.item import RewardFailure
from megatron_vlmr1.rewards.task import INSTRUCTION, Task


def tagged(item):
    if item.solution == "unknown":
        raise RewardFailure("nobody knows")
    return float(answers.answer(item.completion) is not None)


def metrics(text, prompt, measured):
    return {"tagged": measured["tagged"], "never": None}


TASK = Task(
    name="own",
    template="{question} " + INSTRUCTION,
    recipe={"tagged": 1.0, "format": 1.0},
    parse=lambda text, prompt: answers.answer(text),
    metrics=metrics,
    measured_by=("tagged",),
    aggregates={"tagged_rate": "tagged", "never_mean": "never"},
    accuracy="tagged",
)
"""


@pytest.mark.timeout(150)
def test_a_task_of_ones_own(tmp_path: Path) -> None:
    Image.new("RGB", (112, 112), "white").save(tmp_path / "white.png")
    (tmp_path / "own_task.py").write_text(TASK)
    rows = [
        {
            "image": "white.png",
            "category": "odd" if i % 2 else "even",
            **({"accu_reward_method": "format"} if i > 3 else {}),
            "conversations": [
                {"from": "human", "value": "<image>Which colour?"},
                {"from": "gpt", "value": "unknown" if i < 2 else "white"},
            ],
        }
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["shards", "build", tmp_path / "val", "--jsonl", tmp_path / "rows.jsonl", "--images", tmp_path]
    assert main([str(word) for word in words]) == 0
    config = jobs.write_config(
        tmp_path,
        tmp_path / "val",
        task=str(tmp_path / "own_task.py"),
        data={"train": str(tmp_path / "val"), "evaluate": {"val": str(tmp_path / "val")}},
        parallel={"tensor_model_parallel_size": 1},
        rewards={"weights": {"accuracy": 1.0, "format": 0.5}},
    )
    code, output = jobs.run("evaluate", config, "--label", "own", "--json")
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])["val"]
    assert (found["samples"], found["failed"], found["reward_failed"]) == (6, 2, 2)
    assert found["never_mean"] is None
    low, high = found["intervals"]["tagged_rate"]
    assert 0 <= low <= found["tagged_rate"] <= high <= 1
    assert {name: split["samples"] for name, split in found["categories"].items()} == {"even": 2, "odd": 2}
    folder = tmp_path / "run" / "evaluations"
    rows = [json.loads(line) for line in (folder / "own_val.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [2, 3, 4, 5]
    assert found["reward_mean"] == pytest.approx(sum(row["reward"] for row in rows) / 4)
    # The last two rows name the format as their accuracy reward, which then weighs 1.5 alone.
    assert {row["reward"] for row in rows[2:]} <= {0.0, 1.5}
    assert "| tagged_rate |" in (folder / "own.md").read_text()
    assert Image.open(folder / "own_val_worst.png").size == (4 * 328 + 8, 332 + 8)
    assert output.count("cannot be judged: ") == 2
