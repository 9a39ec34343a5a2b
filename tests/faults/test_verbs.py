"""`vlmr1 evaluate` and `vlmr1 convert` through the real program, on a trained run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_vlmr1.cli.main import main
from tests import jobs


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.timeout(150)
def test_evaluate_prints_and_keeps_the_figures_of_each_answer(tmp_path: Path, shards: Path, whole: Path) -> None:
    splits = {"train": str(shards), "evaluate": {"val": str(shards)}}
    config = jobs.write_config(tmp_path, shards, data=splits, evaluate={"limit": 10})
    words = ["--nproc", 2, "--label", "after", "--json", f"model.path={whole}"]
    code, output = jobs.run("evaluate", config, *words)
    assert code == 0, output
    figures = json.loads(output.splitlines()[-1])["val"]
    folder = tmp_path / "run/evaluations"
    assert json.loads((folder / "after.json").read_text()) == {"val": figures}
    assert figures["intervals"]["acc50"][0] <= figures["acc50"] <= figures["intervals"]["acc50"][1]
    assert (figures["failed"], figures["reward_failed"], figures["categories"]) == (0, 0, {})
    assert "| acc50 |" in (folder / "after.md").read_text()
    assert (folder / "after_val_worst.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (folder / "after_val.jsonl").read_text().splitlines()]
    assert len(rows) == figures["samples"] == 10
    assert all(row["box"] == (row["predicted"] or [{"bbox_2d": None}])[0]["bbox_2d"] for row in rows)
    boxes = [(row["box"], json.loads("[" + re.findall(r"\[([^\]]*)\]", row["truth"])[0] + "]")) for row in rows]
    ious = [overlap(*pair) if pair[0] is not None and pair[0][0] < pair[0][2] else 0.0 for pair in boxes]
    assert figures["iou_mean"] == pytest.approx(sum(ious) / 10, abs=1e-6)
    assert figures["acc50"] == pytest.approx(sum(iou > 0.5 for iou in ious) / 10)
    assert figures["format_rate"] == pytest.approx(
        sum(row["text"].count("<answer>") == 1 for row in rows) / 10, abs=0.2
    )
    assert 0 <= figures["reward_mean"] <= 2


@pytest.mark.timeout(150)
def test_convert_export_roundtrip_verify(tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exported, copy = tmp_path / "exported", tmp_path / "copy"

    def convert(*words: object) -> tuple[int, str]:
        code = main(["convert", *map(str, words)])
        return code, capfd.readouterr().out

    assert convert("export", whole, exported) == (0, f"{exported}\n")
    assert convert("verify", whole, exported) == (0, "the same tensors, bit for bit\n")
    assert convert("roundtrip", exported, copy, "--tp", 2)[0] == 0
    assert convert("verify", exported, copy) == (0, "the same tensors, bit for bit\n")
    assert convert("export", whole, exported)[0] == 2  # exists
    half = tmp_path / "half"
    assert convert("export", whole, half, "--dtype", "bf16", "--max-shard-size", "1MB") == (0, f"{half}\n")
    assert len(list(half.glob("model-*-of-*.safetensors"))) == 3
    code, said = convert("verify", "asset:tiny_vlm", copy)
    assert code == 1 and "largest difference" in said and said.rstrip().endswith("differences")


@pytest.mark.timeout(150)
def test_too_many_failed_rewards_stop_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "where?"}, {"from": "gpt", "value": "nowhere"}]  # no box: iou cannot judge
    (tmp_path / "rows.jsonl").write_text((json.dumps({"conversations": turns}) + "\n") * 4)
    assert main(["shards", "build", str(tmp_path / "none"), "--jsonl", str(tmp_path / "rows.jsonl")]) == 0
    config = jobs.write_config(tmp_path, tmp_path / "none", parallel={"tensor_model_parallel_size": 1})
    capfd.readouterr()
    code, output = jobs.run_forked(1, "train", config)
    assert code == 17, output
    (line,) = [line for line in output.splitlines() if "stopped" in line]
    assert line.startswith("vlmr1: stopped: 100% of the scores of a step failed; the first: iou: ")
    assert re.search(r"; of prompt '\d+', which was answered '.+' \(step 0, exit", line), line
    assert line.endswith("(step 0, exit code 17)")
    outcome = json.loads((tmp_path / "run/logs/attempt_0/outcome.json").read_text())
    assert (outcome["code"], outcome["step"]) == (17, 0)
