"""The same numbers on every layout, and transformers' numbers: logits, gradients, generation, ten steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import kind, mixed_prompts, plain_model
from tests.distributed import plain, ranks
from tests.distributed.plain import within

CHECKPOINTS = ("untied", "tied", "one_kv_head")
LAYOUTS = ("one", *ranks.TWO_RANKS)


def metrics_of(path: Path) -> list[dict[str, float]]:
    return json.loads((path / "metrics.json").read_text())


@pytest.mark.parametrize("which", CHECKPOINTS)
def test_logits_are_those_of_transformers(layout_results, which, record_property):
    model = plain_model(layout_results / which)
    kinds = []
    for prompt in mixed_prompts(layout_results / "untied"):
        with torch.no_grad():
            expected = plain.logits(model, prompt)
        kinds.append(len(prompt.images))
        for layout in LAYOUTS:
            found = load_file(layout_results / layout / f"logits_{which}.safetensors")[str(prompt.position)]
            difference = float((found - expected).abs().max())
            within(record_property, f"{which} {layout} prompt {prompt.position}", difference, 1e-4)
    assert {0, 1, 2, 3} <= set(kinds) and float(expected.abs().max()) > 1


def test_the_groups_hold_every_case(layout_results):
    from megatron_vlmr1.data.packing import PackedGroup, pack, split_by_tokens
    from megatron_vlmr1.models.families import read_shape
    from megatron_vlmr1.models.vision import share_out
    from tests.distributed import work

    shape = read_shape(layout_results / "untied")
    groups = work.replayed_groups(layout_results / "untied", layout_results / "one" / "sampled_0.json")
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    reasons = {c.finish_reason for group in groups for c in group.completions}
    failed = sum(int(torch.isnan(torch.from_numpy(group.advantages)).sum()) for group in groups)
    assert (lengths.count(1) >= 2, reasons, failed) == (True, {"stop", "length"}, 2)
    packed = [PackedGroup(g.prompt, tuple(c.token_ids for c in g.completions), (0, 1, 2, 3)) for g in groups]
    parts = split_by_tokens(packed, work.SMALL)
    small = [pack(part, shape.image_token_id, 1) for part in parts]
    large = [pack(part, shape.image_token_id, 1) for part in split_by_tokens(packed, work.LARGE)]
    assert {kind(batch) for batch in small} == {"text", "one image", "images"}
    positions = [group.prompt.position for part in parts for group in part]
    assert len(positions) > len(set(positions)) == 6  # some are cut
    assert [kind(batch) for batch in large] == ["images"]
    (one, *_) = (batch for batch in small if kind(batch) == "one image")
    assert share_out(shape.vision, [image.grid_thw for image in one.images], 2)[1] == []  # a rank without one
    assert not any(group.prompt.images for group in groups[::2])  # nor has data-parallel rank 0


@pytest.mark.parametrize("which", CHECKPOINTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_parameter(layout_results, which, layout, record_property):
    from tests.distributed import work

    expected, loss, kl = plain.replayed_step(layout_results, which)
    assert any(name.startswith("visual.") for name in expected) and all(g.norm() > 0 for g in expected.values())
    alone = plain.read(layout_results / "one" / f"gradients_{which}_{work.LARGE}")
    for size in (work.SMALL, work.LARGE):
        path = layout_results / layout / f"gradients_{which}_{size}"
        found = plain.read(path)
        for other, tensors in (("transformers", expected), ("one process", alone)):
            difference, name = plain.worst(found, tensors)
            within(record_property, f"{which} {layout} {size} against {other}", difference, 1e-5, name)
        metrics = json.loads(path.with_suffix(".json").read_text())
        assert metrics["train/loss"] == pytest.approx(loss, abs=1e-6)
        assert metrics["grpo/kl"] == pytest.approx(kl, rel=1e-5) and kl > 0.01


@pytest.mark.parametrize("layout", ranks.TWO_RANKS)
@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_same_completions(layout_results, layout, how, record_property):
    from tests.distributed import work

    expected = work.read_completions(layout_results / "one" / f"{how}_0.json")
    found = {}
    for path in (layout_results / layout).glob(f"{how}_*.json"):
        found |= work.read_completions(path)
    assert found.keys() == expected.keys()
    gap = 0.0
    for position, row in expected.items():
        for ours, theirs in zip(found[position], row, strict=True):
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            assert (ours.finish_reason, ours.text) == (theirs.finish_reason, theirs.text)
            gap = max(gap, float(abs(ours.logprobs - theirs.logprobs).max()))
    within(record_property, f"log-probs, {layout} {how}", gap, 1e-5)


@pytest.mark.parametrize(
    ("layout", "which"), [*((layout, "untied") for layout in ranks.REPLAYED), ("pp2", "tied"), ("pp2_vp2", "tied")]
)
def test_ten_steps_on_a_replayed_rollout(layout_results, layout, which, record_property):
    start = plain.flat(plain.read(layout_results / which))
    alone = plain.flat(plain.read(layout_results / "one" / which))
    other = plain.flat(plain.read(layout_results / layout / which))
    moved = float((alone - start).norm())
    assert moved > 1
    within(record_property, f"{which} {layout}", float((alone - other).norm()) / moved, 1e-2)
    expected, found = (metrics_of(layout_results / name / which) for name in ("one", layout))
    norms = [abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) for a, b in zip(found, expected, strict=True)]
    within(record_property, f"{which} {layout} first gradient norm", norms[0], 1e-5)
    for name in ("train/loss", "grpo/kl", "grpo/entropy", "train/tokens"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5, abs=1e-6), name
    assert found[0]["grpo/ratio_max"] == 1.0 and found[0]["grpo/clip_frac"] == 0.0
    assert expected[0]["rollout/logprob_gap"] <= 1e-4 or which == "tied"  # the rollout is the untied model's


def test_gradient_norm_is_that_of_transformers(layout_results, record_property):
    for which, frozen in (("untied", False), ("tied", False), ("untied", True)):
        tensors, _, _ = plain.replayed_step(layout_results, which)
        norm = float(plain.flat({n: g for n, g in tensors.items() if not (frozen and n.startswith("visual."))}).norm())
        found = metrics_of(layout_results / "one" / f"{which}{'_frozen' if frozen else ''}")[0]["train/grad_norm"]
        within(record_property, f"{which} frozen={frozen}", abs(found / norm - 1), 1e-5)


@pytest.mark.parametrize("layout", ranks.REPLAYED)
def test_frozen_tower(layout_results, layout, record_property):
    start = plain.read(layout_results / "untied")
    alone = plain.read(layout_results / "one" / "untied_frozen")
    other = plain.read(layout_results / layout / "untied_frozen")
    fixed = [name for name in start if torch.equal(start[name], other[name])]
    assert sorted(fixed) == sorted(name for name in start if name.startswith("visual."))
    ratio = (plain.flat(alone) - plain.flat(other)).norm() / (plain.flat(alone) - plain.flat(start)).norm()
    within(record_property, layout, float(ratio), 1e-2)


@pytest.mark.parametrize("layout", ["pp2", "pp2_vp2"])
def test_both_stages_of_a_tied_model_keep_the_same_weight(layout_results, layout):
    second = load_file(layout_results / layout / "tied_output_layer.safetensors")["weight"]
    first = plain.read(layout_results / layout / "tied")["model.embed_tokens.weight"]
    assert torch.equal(first, second)
