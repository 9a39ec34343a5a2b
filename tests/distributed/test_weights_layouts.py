"""Hugging Face directories through layouts of four ranks and back: bit-equal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.checkpoints import mixed_prompts, plain_model, write_in_bf16, write_random_checkpoint
from tests.distributed import plain, ranks
from tests.distributed.plain import read

LAYOUTS = {"tp2_pp2": (2, 2), "tp2": (2, 1), "pp2": (1, 2), "tp4": (4, 1), "pp4": (1, 4)}
CHECKPOINTS = ("untied", "tied", "odd_vocabulary", "odd_width", "one_kv_head", "bf16")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    from tests.distributed import work_four

    assert (tuple(LAYOUTS), CHECKPOINTS) == (work_four.LAYOUTS, work_four.CHECKPOINTS)
    root = tmp_path_factory.mktemp("round_trips")
    write_random_checkpoint(root / "untied", seed=1)
    write_random_checkpoint(root / "tied", seed=2, tied=True)
    write_random_checkpoint(root / "odd_vocabulary", seed=3, vocab_size=501)
    write_random_checkpoint(root / "odd_width", seed=6, intermediate_size=90)
    write_random_checkpoint(root / "one_kv_head", seed=4, num_key_value_heads=1)
    write_random_checkpoint(root / "fp32", seed=5)
    write_in_bf16(root / "fp32", root / "bf16")
    ranks.run(4, work_four.round_trips, root)
    return root


@pytest.mark.parametrize("which", CHECKPOINTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_equal(written, layout, which):
    source, again = written / which, written / f"again_{layout}" / which
    before, after = read(source), read(again)
    assert before.keys() == after.keys()
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert different == [] and {before[n].dtype for n in before} == {after[n].dtype for n in after}
    weights = {path.name for path in again.glob("model*")}
    stages = LAYOUTS[layout][1]
    shards = {f"model-{i:05d}-of-{stages:05d}.safetensors" for i in range(1, stages + 1)}
    assert weights == ({"model.safetensors"} if stages == 1 else shards | {"model.safetensors.index.json"})
    side = {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert {path.name for path in again.iterdir()} - weights == side
    assert all((source / name).read_bytes() == (again / name).read_bytes() for name in side)


@pytest.mark.parametrize("layout", ["tp2_pp2", "pp4"])
def test_the_index_is_true(written, layout):
    directory = written / f"again_{layout}" / "tied"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    seen, size = {}, 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            seen |= dict.fromkeys(tensors.keys(), path.name)
            size += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())
    assert index == {"metadata": {"total_size": size}, "weight_map": seen}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_rows_are_zeros_on_the_last_rank(written, layout):
    tp, _ = LAYOUTS[layout]
    seen = [json.loads((written / f"padding_{layout}_{rank}.json").read_text()) for rank in range(4)]
    assert {rows for facts in seen for rows in facts["rows"]} == {math.ceil(501 / tp)}
    assert {p for facts in seen for p in facts["padding"]} == {0.0}


@pytest.mark.parametrize("which", ["tied", "odd_vocabulary", "odd_width", "one_kv_head"])
def test_logits_on_four_ranks(written, which, record_property):
    model = plain_model(written / which)
    for prompt in mixed_prompts(written / which):
        with torch.no_grad():
            expected = plain.logits(model, prompt)
        for layout in LAYOUTS:
            found = load_file(written / f"logits_{layout}_{which}.safetensors")[str(prompt.position)]
            difference = float((found - expected).abs().max())
            plain.within(record_property, f"{layout} {which} prompt {prompt.position}", difference, 1e-4)


def test_written_in_another_type(written):
    source, again = read(written / "fp32"), read(written / "again_as_bf16")
    assert all(torch.equal(source[name].bfloat16(), again[name]) for name in source)
    assert AutoModelForImageTextToText.from_pretrained(written / "again_as_bf16", dtype="auto").dtype is torch.bfloat16


def test_transformers_loads_what_four_ranks_wrote(written):
    for which in ("untied", "tied"):
        before, after = (plain_model(path / which).state_dict() for path in (written, written / "again_tp2_pp2"))
        assert all(torch.equal(before[name], after[name]) for name in before)
