"""Uneven and virtual pipeline stages on four ranks, with activations computed again: the numbers of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import banned_ids, mixed_prompts, plain_model, write_random_checkpoint
from tests.distributed import plain, ranks
from tests.distributed.plain import within

LAYOUTS = ("tp2_pp2_vp2", "pp4_vp2", "dp2_pp2")


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("deep")
    for seed, name in enumerate(("untied", "untied_reference")):
        write_random_checkpoint(root / name, seed=20 + seed, num_hidden_layers=8, vocab_size=501)
    (root / "one").mkdir()
    with ranks.alone() as mesh:
        from tests.distributed import work

        prompts = mixed_prompts(root / "untied")
        # transformers gives the embedding of the padding token no gradient
        padding = json.loads((root / "untied" / "config.json").read_text())["text_config"]["pad_token_id"]
        policy = work.load_policy(root / "untied", mesh, banned=[*banned_ids(root / "untied"), padding])
        completions = work.generate(policy, prompts, greedy=False)
        work.write_completions(root / "one" / "sampled_0.json", prompts, completions)
    from tests.distributed import work_deep

    assert tuple(work_deep.LAYOUTS) == LAYOUTS
    ranks.run(4, work_deep.everything, root)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bit_equal(deep, layout):
    before, after = plain.read(deep / "untied"), plain.read(deep / layout / "again")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits(deep, layout, record_property):
    model = plain_model(deep / "untied")
    found = load_file(deep / layout / "logits.safetensors")
    for prompt in mixed_prompts(deep / "untied"):
        with torch.no_grad():
            expected = plain.logits(model, prompt)
        difference = float((found[str(prompt.position)] - expected).abs().max())
        within(record_property, f"{layout} prompt {prompt.position}", difference, 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_parameter(deep, layout, record_property):
    from tests.distributed import work

    expected, loss, kl = plain.replayed_step(deep, "untied")
    for size in (work.SMALL, work.LARGE):
        path = deep / layout / f"gradients_untied_{size}"
        difference, name = plain.worst(plain.read(path), expected)
        within(record_property, f"{layout} {size}", difference, 1e-5, name)
        metrics = json.loads(path.with_suffix(".json").read_text())
        assert metrics["train/loss"] == pytest.approx(loss, abs=1e-6)
        assert metrics["grpo/kl"] == pytest.approx(kl, rel=1e-5)


def test_the_state_goes_on_bit_for_bit(deep):
    out = deep / "state_tp2_pp2_vp2"
    for rank in range(4):
        seen = json.loads((out / f"seen_{rank}.json").read_text())
        assert (seen["progress"], seen["generator"]) == (True, True)
        assert seen["straight"] == seen["resumed"]
    start, straight, resumed = (plain.read(out / name) for name in ("hf", "straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not any(torch.equal(start[name], straight[name]) for name in start)


def test_the_state_goes_on_without_virtual_stages(deep, record_property):
    straight = json.loads((deep / "state_tp2_pp2_vp2" / "seen_0.json").read_text())["straight"]
    other = json.loads((deep / "state_other.json").read_text())
    for step, (a, b) in enumerate(zip(straight, other, strict=True)):
        difference = abs(a["train/grad_norm"] / b["train/grad_norm"] - 1)
        within(record_property, f"gradient norm, step {step} after", difference, 1e-5)
    start, end, found = (
        plain.flat(plain.read(deep / name))
        for name in ("state_tp2_pp2_vp2/hf", "state_tp2_pp2_vp2/straight", "state_other")
    )
    within(record_property, "weights", float((found - end).norm() / (end - start).norm()), 1e-2)
