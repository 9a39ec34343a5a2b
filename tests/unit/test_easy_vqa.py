"""easy-VQA: every question and picture of the package, in our rows; and what is said without the package."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import easy_vqa as package
import pytest
from transformers import AutoTokenizer

from megatron_vlmr1 import config
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.data import easy_vqa, rows
from megatron_vlmr1.rewards.functions import default, format
from megatron_vlmr1.rewards.item import RewardItem

ASSET = Path(easy_vqa.__file__).parents[1] / "assets" / "tiny_vlm"


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_split_is_the_whole_of_the_package(tmp_path: Path) -> None:
    made = written(easy_vqa.write_split(tmp_path, "test"))
    texts, answers, numbers = package.get_test_questions()
    assert len(made) == len(texts) == len({row["id"] for row in made}) == 9673
    for row, text, answer, number in zip(made, texts, answers, numbers, strict=True):
        assert [turn["value"] for turn in row["conversations"]] == [f"<image>{text}", answer]
        assert row["image"] == f"test-{number:04d}.png"
    paths = package.get_test_image_paths()
    assert len(list((tmp_path / "images").iterdir())) == 1000
    for number in range(0, 1000, 97):
        assert (tmp_path / "images" / f"test-{number:04d}.png").read_bytes() == Path(paths[number]).read_bytes()
    assert {row["conversations"][1]["value"] for row in made} == set(package.get_answers()) == easy_vqa.ANSWERS
    kinds = Counter(row["category"] for row in made)
    assert kinds["yes/no"] == 7136  # as its own card counts them
    assert kinds["color"] == sum(a in easy_vqa.COLOURS for a in answers) and len(kinds) == 3


def test_the_train_split_is_the_packages_own_and_shares_no_picture(tmp_path: Path) -> None:
    train = written(easy_vqa.write_split(tmp_path, "train", 400))
    texts, answers, numbers = package.get_train_questions()
    assert len(texts) == 38_575
    for i, row in enumerate(train):
        number = i * 38_575 // 400
        assert [turn["value"] for turn in row["conversations"]] == [f"<image>{texts[number]}", answers[number]]
        assert row["image"] == f"train-{numbers[number]:04d}.png"
    train_paths, test_paths = package.get_train_image_paths().values(), package.get_test_image_paths().values()
    assert not {Path(p).read_bytes() for p in train_paths} & {Path(p).read_bytes() for p in test_paths}


def test_a_count_is_spread_over_the_split_and_repeatable(tmp_path: Path) -> None:
    few, again = (written(easy_vqa.write_split(tmp_path / name, "test", 100)) for name in "ab")
    assert few == again and len(few) == 100
    numbers = [int(row["id"].removeprefix("test-")) for row in few]
    assert numbers == [i * 9673 // 100 for i in range(100)]
    assert len({row["image"] for row in few}) > 95
    assert sorted(p.name for p in (tmp_path / "a" / "images").iterdir()) == sorted({row["image"] for row in few})


def test_thoughts_are_right_and_the_text_earns_full_reward(tmp_path: Path) -> None:
    """Where a picture's questions say both colour and shape, both are what its own other questions confirm."""
    made = written(easy_vqa.write_split(tmp_path, "test"))
    truth: dict[str, dict[str, str]] = {}
    for row in made:
        if row["category"] != "yes/no":
            answers = truth.setdefault(row["image"], {})
            answer = row["conversations"][1]["value"]
            assert answers.setdefault(row["category"], answer) == answer  # the data do not contradict themselves
    lengths = Counter()
    for row in made:
        thought = row["completion"].split("<think>")[1].split("</think>")[0].split()
        lengths[len(thought)] += 1
        for word in thought:
            kind = "color" if word in easy_vqa.COLOURS else "shape"
            assert truth.get(row["image"], {}).get(kind, word) == word
    assert sum(lengths[n] for n in (0, 1, 2)) == len(made) and lengths[2] > 0.9 * len(made)
    for row in made[:200]:
        item = RewardItem(row["completion"], row["conversations"][1]["value"], (64, 64), (1, 8, 8), "none", "", None)
        assert default.score(item) == format.score(item) == 1.0
        assert rows.parse(json.dumps(row).encode()).solution == row["conversations"][1]["value"]


def test_what_the_answers_say_of_a_picture() -> None:
    told = easy_vqa.what_is_known(
        [
            ("is there a red shape?", "yes", 1),
            ("is there a circle?", "no", 1),
            ("is no triangle present?", "no", 1),
            ("is there not a blue shape?", "yes", 1),
            ("what color is the circle?", "teal", 2),
            ("is there a gray shape?", "no", 3),
        ]
    )
    assert told == {1: "red triangle", 2: "teal circle"}


def test_the_tiny_model_can_write_every_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    for answer in easy_vqa.ANSWERS:
        text = f"<think> {answer} </think><answer>{answer}</answer>"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) <= 20
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_configs_belong_together() -> None:
    sft, grpo = (config.load(f"configs/{name}.yaml") for name in ("vqa_sft", "vqa"))
    assert (sft.method, grpo.method, sft.task, grpo.task) == ("sft", "grpo", "vqa", "vqa")
    assert (sft.model.path, grpo.model.path) == ("asset:tiny_vlm", sft.run_dir)
    assert sft.data == grpo.data and list(grpo.data.evaluate) == ["test"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "easy-vqa", str(tmp_path), "--split", "test", "--count", "50"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'test.jsonl'}\n"
    words = ["--jsonl", str(tmp_path / "test.jsonl"), "--images", str(tmp_path / "images")]
    assert main(["shards", "build", str(tmp_path / "shards"), *words]) == 0
    assert "50 samples with 50 images" in capsys.readouterr().out


def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(message: str, *options: str) -> None:
        assert main(["shards", "easy-vqa", str(tmp_path / "x"), "--split", "test", *options]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and message in line

    failed("--count 9674: split test of easy-vqa has 9673 questions", "--count", "9674")
    failed("--count 0: split test", "--count", "0")
    monkeypatch.setattr(package, "get_test_questions", lambda: (["is it?"], ["maybe"], [0]))
    failed("not the data set meant here")
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    failed('easy-vqa is not installed: pip install "easy-vqa>=1.0,<2"')
    assert not (tmp_path / "x").exists()
