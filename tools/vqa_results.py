"""GRPO of the shipped tiny VLM on easy-VQA, as README describes it: docs/results/vqa.{json,md,png}.

A second call only does what is missing. About 6 minutes on 2 quiet cores.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from megatron_vlmr1.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results"
RUN, WARM = "runs/vqa", "runs/vqa_sft"
COUNTS = {"train": 38_575, "test": 640}
MODELS = {"shipped": "asset:tiny_vlm", "warm": WARM, "grpo": RUN}
TITLES = {
    "blind": "the commonest answer to each question, no picture",
    "shipped": "shipped tiny VLM",
    "warm": "after the warm start",
    "grpo": "after GRPO",
}
PAGE = """\
# easy-VQA: a warm start and GRPO of the shipped tiny VLM

{machine}, 2 data-parallel ranks, seed 0. Greedy answers to {count} questions of the data set's own test split, which
shares no picture with the train split. `python tools/vqa_results.py` makes this page; `vqa.json` has the commands.

| | accuracy (95 % interval) | yes/no | shape | color | format |
|---|---|---|---|---|---|
{rows}

![Accuracy and reward over the steps of GRPO](vqa.png)

GRPO took {seconds:.0f} s, with other work on the machine. The warm start learns from texts: colour and shape in the
think block, then the answer. GRPO sees no text, only which of its own answers are right.
"""


def commands() -> dict[str, str]:
    """Return what is run, each by the file that it leaves."""
    found = {}
    for split, count in COUNTS.items():
        rows, data = f"{RUN}/rows", f"{RUN}/data/{split}"
        found[f"{rows}/{split}.jsonl"] = f"shards easy-vqa {rows} --split {split} --count {count}"
        found[data] = f"shards build {data} --jsonl {rows}/{split}.jsonl --images {rows}/images"
    found[f"{WARM}/checkpoints/latest"] = "train configs/vqa_sft.yaml --nproc 2"
    found[f"{RUN}/facts.json"] = "train configs/vqa.yaml --nproc 2"
    for label, model in MODELS.items():
        words = f"evaluate configs/vqa.yaml --nproc 2 --label {label} model.path={model}"
        found[f"{RUN}/evaluations/{label}.json"] = words
    return found


def main() -> None:
    """Run what is missing and write the results."""
    for made, words in commands().items():
        if not (ROOT / made).exists():
            command = [sys.executable, "-m", "megatron_vlmr1.cli", *shlex.split(words)]
            subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603 - our own
    stages = {label: evaluated(label) for label in MODELS}
    metrics = read_metrics(ROOT / RUN)
    curve = {step + 1: row["evaluate/test/accuracy"] for step, row in metrics if "evaluate/test/accuracy" in row}
    result = {
        "machine": f"{platform.machine()}, 2 cores, no GPU",
        "commands": [f"vlmr1 {words}" for words in commands().values()],
        "questions": COUNTS,
        "test": {"blind": blind(), **stages},
        "accuracy_by_grpo_step": {0: stages["warm"]["accuracy"], **curve},
        "reward_by_grpo_step": [round(row["reward/mean"], 4) for _, row in metrics],
        "grpo_seconds": round(sum(row["perf/step_s"] for _, row in metrics), 1),
    }
    (OUT / "vqa.json").write_text(json.dumps(result, indent=1) + "\n")
    page = PAGE.format(
        machine=result["machine"],
        count=COUNTS["test"],
        rows="\n".join(table_row(TITLES[label], row) for label, row in result["test"].items()),
        seconds=result["grpo_seconds"],
    )
    (OUT / "vqa.md").write_text(page)
    draw(result["accuracy_by_grpo_step"], result["reward_by_grpo_step"])


def evaluated(label: str) -> dict[str, Any]:
    """Return what the page says of one evaluation."""
    figures = json.loads((ROOT / RUN / "evaluations" / f"{label}.json").read_bytes())["test"]
    by_category = {name: row["accuracy"] for name, row in figures["categories"].items()}
    kept = {"accuracy": figures["accuracy"], "interval": figures["intervals"]["accuracy"], "categories": by_category}
    return {**kept, "format_rate": figures["format_rate"]}


def blind() -> dict[str, Any]:
    """Answer each question of the test split as most of the same questions of the train split are answered."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, _ in read_rows("train"):
        answers[question][answer] += 1
    right = [
        (category, bool(answers[question]) and answers[question].most_common(1)[0][0] == answer)
        for question, answer, category in read_rows("test")
    ]
    names = sorted({category for category, _ in right})
    by_category = {name: share([hit for category, hit in right if category == name]) for name in names}
    return {"accuracy": share([hit for _, hit in right]), "categories": by_category}


def read_rows(split: str) -> list[tuple[str, str, str]]:
    """Return question, answer and category of each row."""
    rows = map(json.loads, (ROOT / RUN / "rows" / f"{split}.jsonl").read_text().splitlines())
    return [(*(turn["value"] for turn in row["conversations"]), row["category"]) for row in rows]


def share(hits: list[bool]) -> float:
    """Return the share that is true."""
    return sum(hits) / len(hits)


def table_row(title: str, row: dict[str, Any]) -> str:
    """Return one line of the page's table."""
    interval = "" if "interval" not in row else " ({:.3f} to {:.3f})".format(*row["interval"])
    categories = " | ".join(f"{row['categories'][name]:.3f}" for name in ("yes/no", "shape", "color"))
    written = f"{row['format_rate']:.3f}" if "format_rate" in row else ""
    return f"| {title} | {row['accuracy']:.3f}{interval} | {categories} | {written} |"


def draw(curve: dict[int, float], rewards: list[float]) -> None:
    """Draw held-out accuracy and the mean reward over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(list(curve), list(curve.values()), marker="o")
    left.set(title="accuracy, test split", xlabel="step of GRPO", ylim=(0, 1))
    windows = [rewards[max(0, i - 9) : i + 1] for i in range(len(rewards))]
    right.plot(range(1, len(rewards) + 1), [sum(window) / len(window) for window in windows])
    right.set(title="reward, mean of 10 steps", xlabel="step of GRPO", ylim=(0, 2))
    figure.savefig(OUT / "vqa.png", dpi=110)


if __name__ == "__main__":
    main()
