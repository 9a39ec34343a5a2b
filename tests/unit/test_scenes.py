"""Scenes: deterministic, disjoint, truthful; tokenizer: short, reversible."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from megatron_vlmr1.data import scene_tokenizer, scenes

COUNT = 60
SETTINGS = {
    "text_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
}


@functools.cache
def drawn(split: str) -> list[scenes.Scene]:
    return [scenes.scene(split, index) for index in range(COUNT)]


def test_a_scene_is_a_function_of_split_and_index() -> None:
    first, again = scenes.scene("heldout", 7), scenes.scene("heldout", 7)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert (first.expression, first.objects, first.completion) == (again.expression, again.objects, again.completion)
    assert scenes.scene("heldout", 8).scene_hash != first.scene_hash


def test_scenes_do_not_change_between_versions() -> None:
    """The shipped checkpoint and its figures belong to these pictures."""
    item = scenes.scene("train", 0)
    assert item.box == (47, 45, 83, 81)
    assert item.expression == "the green shape"
    assert item.scene_hash.startswith("65feeec4a047fdaa")


def test_splits_share_neither_seed_nor_layout() -> None:
    seeds = [split.seed for split in scenes.SPLITS.values()]
    assert len(set(seeds)) == len(seeds)
    residues = [residue for split in scenes.SPLITS.values() for residue in split.residues]
    assert len(set(residues)) == len(residues) == 8
    for name, split in scenes.SPLITS.items():
        assert {int(item.scene_hash, 16) % 8 for item in drawn(name)} <= split.residues


def test_unseen_combinations_are_only_out_of_domain() -> None:
    for split in ("train", "heldout"):
        seen = {(o.colour, o.shape) for item in drawn(split) for o in item.objects}
        assert not seen & scenes.UNSEEN
        assert len(seen) == len(scenes.COLOURS) * len(scenes.SHAPES) - len(scenes.UNSEEN)
    for item in drawn("ood"):
        assert (item.objects[0].colour, item.objects[0].shape) in scenes.UNSEEN


@pytest.mark.parametrize("split", list(scenes.SPLITS))
def test_boxes_are_tight_and_apart(split: str) -> None:
    for item in drawn(split)[:40]:
        pixels = np.asarray(item.image).astype(int)
        spread = pixels.max(axis=2) - pixels.min(axis=2)
        for position, thing in enumerate(item.objects):
            x1, y1, x2, y2 = thing.box
            inside = spread[y1:y2, x1:x2] > 75  # colours are saturated, the background is nearly grey
            assert inside.mean() > 0.4
            assert inside[:, [0, -1]].any() and inside[[0, -1], :].any()
            for other in item.objects[position + 1 :]:
                ox1, oy1, ox2, oy2 = other.box
                assert ox1 >= x2 or ox2 <= x1 or oy1 >= y2 or oy2 <= y1


def test_an_expression_means_one_object() -> None:
    pattern = re.compile(r"the (\w+) (\w+)(?: at the (\w+ \w+))?")
    kinds = set()
    for item in drawn("train") + drawn("heldout") + drawn("ood"):
        match = pattern.fullmatch(item.expression)
        assert match
        colour, shape, place = match.groups()
        meant = [
            o for o in item.objects if o.colour == colour and shape in ("shape", o.shape) and place in (None, o.place)
        ]
        assert meant == [item.objects[0]]
        kinds.add((shape == "shape", place is None))
    assert kinds == {(True, True), (True, False), (False, True)}


def test_completions_are_rough_in_two_styles() -> None:
    tagged = re.compile(r"<think> (\w+) (\w+ \w+) (\w+) </think><answer>(.*)</answer>")
    overlaps, bare = [], 0
    for item in (scenes.scene("train", index) for index in range(300)):
        match = tagged.fullmatch(item.completion)
        bare += match is None
        if match:
            target = item.objects[0]
            assert match.groups()[:3] == (target.colour, target.place, target.shape)
        x1, y1, x2, y2 = json.loads(match.group(4) if match else item.completion)["bbox_2d"]
        tx1, ty1, tx2, ty2 = item.box
        assert 0 <= x1 <= tx1 and 0 <= y1 <= ty1 and tx2 <= x2 <= scenes.SIZE and ty2 <= y2 <= scenes.SIZE
        overlaps.append((tx2 - tx1) * (ty2 - ty1) / ((x2 - x1) * (y2 - y1)))
    assert abs(bare / 300 - scenes.BARE_SHARE) < 0.08
    # Two sides of width pushed by U(0, p) each: E[1 / (1 + u + v)] = 0.765 at p = 0.32, squared as both axes are free.
    assert abs(np.mean(overlaps) - 0.765**2) < 0.03


def test_styles_of_sft_text() -> None:
    item = scenes.scene("train", 0)
    caption = "<think> green bottom right circle </think>"
    assert scenes.sft_text(item, "caption") == caption
    assert scenes.sft_text(item, "clean") == f'{caption}<answer>{{"bbox_2d": [47, 45, 83, 81]}}</answer>'
    assert scenes.sft_text(item, "rough") == item.completion
    assert scenes.row(item, "clean")["completion"] == scenes.sft_text(item, "clean")


def test_write_split_is_readable_rows_and_pictures(tmp_path: Path) -> None:
    path = scenes.write_split(tmp_path, "heldout", 3, start=5)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        *(f"heldout-{index:06d}.png" for index in (5, 6, 7)),
        "heldout.jsonl",
    ]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, index in zip(rows, (5, 6, 7), strict=True):
        item = scenes.scene("heldout", index)
        with Image.open(tmp_path / "images" / row["image"]) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(item.image))
        human, gpt = row["conversations"]
        assert human["value"] == f"<image>{scenes.QUESTION.format(expression=item.expression)}"
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert json.loads(gpt["value"]) == list(item.box)
        assert (row["id"], row["completion"], row["scene_hash"]) == (item.key, item.completion, item.scene_hash)


def test_bad_requests_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown split 'test': choose one of train, heldout, ood"):
        scenes.scene("test", 0)
    with pytest.raises(ValueError, match="scene index -1 of split train is negative"):
        scenes.scene("train", -1)
    with pytest.raises(ValueError, match="a count of 0 scenes"):
        scenes.write_split(tmp_path, "train", 0)
    with pytest.raises(ValueError, match="vocab_size 64 is below the tokenizer's"):
        text = {**SETTINGS["text_config"], "vocab_size": 64}
        scene_tokenizer.build_checkpoint_files(tmp_path, {**SETTINGS, "text_config": text})


def test_checkpoint_files_load_in_transformers(tmp_path: Path) -> None:
    written = scene_tokenizer.build_checkpoint_files(tmp_path, SETTINGS)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert config.text_config.vocab_size == written.text_config.vocab_size == 512 >= len(tokenizer)
    assert tokenizer.convert_ids_to_tokens([config.image_token_id, config.vision_start_token_id]) == [
        "<|image_pad|>",
        "<|vision_start|>",
    ]
    item = scenes.scene("train", 0)
    processed = AutoImageProcessor.from_pretrained(tmp_path)(images=[item.image], return_tensors="np")
    assert processed["image_grid_thw"].tolist() == [[1, 8, 8]]  # 112 pixels stay 112 pixels

    question = scenes.QUESTION.format(expression="the red shape at the top left") + scene_tokenizer.INSTRUCTION
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(tokenizer(prompt)["input_ids"]) + 15 <= 45
    for text, most in ((item.completion + "<|im_end|>", 24), ("naïve 12,5 <b>\n\n 猫", 99)):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) <= most
        assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer("407")["input_ids"]] == ["4", "0", "7"]
