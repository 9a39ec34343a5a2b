"""Detection scenes: deterministic, disjoint, and their truth is what the pixels show."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlmr1.cli.main import main
from megatron_vlmr1.data import detection_scenes, scenes
from megatron_vlmr1.data.detection_scenes import DetectionScene, label
from megatron_vlmr1.rewards.functions import odLength
from megatron_vlmr1.rewards.item import RewardItem

COUNT = 120
UNSEEN = {f"{colour} {shape}" for colour, shape in scenes.UNSEEN}
CENTRES = {name: np.array(rgb) for name, rgb in scenes.COLOURS.items()}


@functools.cache
def drawn(split: str) -> list[DetectionScene]:
    return [detection_scenes.scene(split, index) for index in range(COUNT)]


def seen(image: Image.Image) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Find the shapes of a picture from its pixels: blobs of saturated colour, their extent, and how full that is."""
    pixels = np.asarray(image).astype(int)
    # A shape's pixels differ among themselves by noise only; the background is nearly grey.
    left = pixels.max(axis=2) - pixels.min(axis=2) > 75
    found = []
    while left.any():
        blob = np.zeros_like(left)
        blob[np.unravel_index(np.argmax(left), left.shape)] = True
        while True:
            grown = blob.copy()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    grown |= np.roll(blob, (dy, dx), (0, 1))
            grown &= left
            if (grown == blob).all():
                break
            blob = grown
        left &= ~blob
        if blob.sum() < 60:
            continue  # a speck of noise
        ys, xs = np.nonzero(blob)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        mean = pixels[blob].mean(axis=0)
        colour = min(CENTRES, key=lambda name: float(np.abs(CENTRES[name] - mean).sum()))
        fullness = blob.sum() / ((box[2] - box[0]) * (box[3] - box[1]))
        shape = "square" if fullness > 0.9 else "circle" if fullness > 0.65 else "triangle"
        found.append((f"{colour} {shape}", box))
    return found


def test_a_scene_is_a_function_of_split_and_index() -> None:
    first, again = (detection_scenes.scene("heldout", 7) for _ in range(2))
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert detection_scenes.row(first) == detection_scenes.row(again)
    other = detection_scenes.scene("heldout", 8)
    assert (other.objects, other.image.tobytes()) != (first.objects, first.image.tobytes())


def test_scenes_do_not_change_between_versions() -> None:
    item = detection_scenes.scene("train", 0)
    assert item.asked == ("yellow circle", "red triangle", "yellow square")
    assert detection_scenes.answer(item, [o.box for o in item.objects]) == (
        '[{"bbox_2d": [85, 21, 105, 41], "label": "yellow circle"}, {"bbox_2d": [5, 62, 26, 83], "label": '
        '"yellow circle"}, {"bbox_2d": [42, 9, 68, 35], "label": "yellow circle"}]'
    )


@pytest.mark.parametrize("split", list(scenes.SPLITS))
def test_the_truth_is_what_the_pixels_show(split: str) -> None:
    for item in drawn(split)[:40]:
        question, truth = (turn["value"] for turn in detection_scenes.row(item)["conversations"])
        named = re.fullmatch(r"<image>Detect every object of these classes in the picture: (.+)\.", question)
        assert named
        asked = named.group(1).split(", ")
        assert len(set(asked)) == len(asked)
        told = [] if truth == "None" else [(row["label"], tuple(row["bbox_2d"])) for row in json.loads(truth)]
        shown = [(name, box) for name, box in seen(item.image) if name in asked]
        assert len(told) == len(shown)
        for name, box in told:
            nearest = min((np.abs(np.subtract(box, other)).max() for n, other in shown if n == name), default=99)
            assert nearest <= 2, (item.key, name, box, shown)  # noise may hide a pixel of an edge


def test_shares_of_absent_classes_and_of_repeats() -> None:
    for split in scenes.SPLITS:
        items = drawn(split)
        classes = [{label(o) for o in item.objects} for item in items]
        empty = np.mean([not item.found for item in items])
        some_absent = np.mean([bool(set(item.asked) - here) for item, here in zip(items, classes, strict=True)])
        repeated = np.mean([len(here) < len(item.objects) for item, here in zip(items, classes, strict=True)])
        assert (0.05 < empty < 0.3) if split != "ood" else empty == 0
        assert some_absent > 0.4 and repeated > 0.4
        assert {len(item.asked) for item in items} == {1, 2, 3, 4}
        assert {len(item.objects) for item in items} <= set(detection_scenes.OBJECTS[split])
        assert any(len({label(item.objects[i]) for i in item.found}) > 1 for item in items)


def test_unseen_classes_are_only_out_of_domain() -> None:
    for split in ("train", "heldout"):
        assert not UNSEEN & {name for item in drawn(split) for name in (*item.asked, *map(label, item.objects))}
    for item in drawn("ood"):
        assert UNSEEN & {label(item.objects[i]) for i in item.found}


def test_no_layout_is_in_two_splits() -> None:
    for name, split in scenes.SPLITS.items():
        assert {int(scenes.layout_hash(item.objects), 16) % 8 for item in drawn(name)} <= split.residues


def test_styles_of_sft_text() -> None:
    texts = {
        style: [detection_scenes.sft_text(item, style) for item in drawn("train")]
        for style in ("caption", "clean", "rough")
    }
    tagged = re.compile(r"(<think> [a-z, ]+ </think>)<answer>(.*)</answer>")
    for item, caption, clean, rough in zip(drawn("train"), *texts.values(), strict=True):
        match = tagged.fullmatch(clean)
        assert match and match.group(1) == caption
        truth = detection_scenes.row(item)["conversations"][1]["value"]
        assert match.group(2) == truth
        assert all(name in caption for name in item.asked)
        parts = tagged.fullmatch(rough)
        said = parts.group(2) if parts else rough
        if truth == "None":
            assert said == "None"
            continue
        for true, loose in zip(json.loads(truth), json.loads(said), strict=True):
            x1, y1, x2, y2 = loose["bbox_2d"]
            tx1, ty1, tx2, ty2 = true["bbox_2d"]
            assert true["label"] == loose["label"] and 0 <= x1 <= tx1 and 0 <= y1 <= ty1
            assert tx2 <= x2 <= scenes.SIZE and ty2 <= y2 <= scenes.SIZE
    bare = sum(not tagged.fullmatch(text) for text in texts["rough"])
    assert abs(bare / COUNT - scenes.BARE_SHARE) < 0.12


def test_the_reward_of_the_task_takes_the_truth_for_right() -> None:
    for item in drawn("heldout")[:20]:
        truth = detection_scenes.row(item)["conversations"][1]["value"]
        clean = detection_scenes.sft_text(item, "clean")
        judged = RewardItem(clean, truth, (112, 112), (1, 8, 8), "none", "qwen2_5_vl", None)
        assert odLength.score(judged) == pytest.approx(1.0)


def test_the_command_builds_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shards", "scenes", str(tmp_path / "a"), "--split", "ood", "--count", "3"]
    assert main([*words, "--task", "ovd", "--start", "4", "--style", "clean"]) == 0
    jsonl = tmp_path / "a" / "ood.jsonl"
    assert capsys.readouterr().out == f"{jsonl}\n"
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert rows == [detection_scenes.row(detection_scenes.scene("ood", i), "clean") for i in (4, 5, 6)]
    for row, item in zip(rows, (detection_scenes.scene("ood", i) for i in (4, 5, 6)), strict=True):
        with Image.open(tmp_path / "a" / "images" / row["image"]) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(item.image))
    built = ["shards", "build", str(tmp_path / "b"), "--jsonl", str(jsonl), "--images", str(jsonl.parent / "images")]
    assert main(built) == 0
    assert "3 samples with 3 images" in capsys.readouterr().out


def test_rec_is_the_default_task(tmp_path: Path) -> None:
    words = ["--split", "train", "--count", "2"]
    assert main(["shards", "scenes", str(tmp_path / "a"), *words]) == 0
    assert main(["shards", "scenes", str(tmp_path / "b"), *words, "--task", "rec"]) == 0
    a, b = ((tmp_path / name / "train.jsonl").read_bytes() for name in "ab")
    assert a == b == "".join(json.dumps(scenes.row(scenes.scene("train", i))) + "\n" for i in (0, 1)).encode()


@pytest.mark.parametrize("task", ["rec", "ovd"])
def test_bad_input_is_one_line_and_code_2(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out, options, message in (
        ("x", ["--count", "0"], "a count of 0 scenes makes no file"),
        ("x", ["--count", "1", "--start", "-1"], "scene index -1 of split train is negative"),
        ("file", ["--count", "1"], "cannot be written"),
    ):
        words = ["shards", "scenes", str(tmp_path / out), "--split", "train", "--task", task, *options]
        assert main(words) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and message in line
    assert not list(tmp_path.rglob("*.jsonl"))
