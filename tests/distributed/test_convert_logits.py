"""A converted checkpoint computes what transformers computes with it: real pictures, all positions, five layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlmr1.checkpoint.release import export
from tests.checkpoints import plain_model, real_prompts, write_random_checkpoint
from tests.distributed import plain, ranks
from tests.distributed.plain import Tensors, within

LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp4": {"tensor_model_parallel_size": 4},
    "pp2": {"pipeline_model_parallel_size": 2, "pipeline_layers": [4, 3]},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "pipeline_layers": [3, 4]},
}
KINDS = ("text only", "one image", "three images", "different sizes", "long", "one pixel off")


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    """Our logits of ``model``, whose tower has windowed blocks and full ones."""
    from tests.distributed import work_convert_logits

    root = tmp_path_factory.mktemp("convert_logits")
    write_random_checkpoint(root / "model", seed=41, num_hidden_layers=7, vocab_size=501, intermediate_size=90)
    ranks.run(4, work_convert_logits.everything, root, layouts=LAYOUTS)
    return root


@torch.no_grad()
def transformers_logits(directory: Path, dtype: str = "float32") -> Tensors:
    """Return transformers' logits [T, vocabulary] of each prompt, by its kind."""
    model = plain_model(directory, dtype)
    return {kind: plain.logits(model, prompt).float() for kind, prompt in real_prompts(directory).items()}


@pytest.fixture(scope="module")
def expected(computed) -> Tensors:
    return transformers_logits(computed / "model")


@pytest.fixture(scope="module")
def theirs_in_bf16(computed) -> Tensors:
    return transformers_logits(computed / "model", "bfloat16")


def ours(computed: Path, dtype: str, layout: str, kind: str) -> torch.Tensor:
    return load_file(computed / f"{dtype}_{layout}.safetensors")[str(KINDS.index(kind))]


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ||found - exact|| / ||exact||."""
    return float((found - exact).norm() / exact.norm())


def test_prompts_are_what_their_names_say(computed):
    prompts = real_prompts(computed / "model")
    assert tuple(prompts) == KINDS
    grids = {kind: [image.grid_thw for image in prompt.images] for kind, prompt in prompts.items()}
    assert [len(grids[kind]) for kind in KINDS] == [0, 1, 3, 4, 1, 2]
    assert len(set(grids["three images"])) == 1 and len(set(grids["different sizes"])) == 4
    assert len({image.digest for prompt in prompts.values() for image in prompt.images}) == 11
    assert len(prompts["long"].token_ids) >= 1500
    sizes = [
        (image.size, (14 * w, 14 * h)) for image in prompts["one pixel off"].images for _, h, w in [image.grid_thw]
    ]
    assert sizes == [((57, 83), (56, 84)), ((113, 139), (112, 140))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_logits(computed, expected, layout, kind, record_property):
    found = ours(computed, "float32", layout, kind)
    assert found.shape == expected[kind].shape
    within(record_property, f"{layout}, {kind}", float((found - expected[kind]).abs().max()), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_logits_err_no_more_than_those_of_transformers(
    computed, expected, theirs_in_bf16, layout, kind, record_property
):
    found = ours(computed, "bfloat16", layout, kind)
    error, their_error = relative(found, expected[kind]), relative(theirs_in_bf16[kind], expected[kind])
    record_property(f"transformers, {kind}", their_error)
    within(record_property, f"{layout}, {kind}", error, 1.5 * their_error)
    assert 1e-3 < error  # bf16 it was


def test_an_exported_directory_gives_the_same_bits(computed, expected):
    out = export(computed / "model", computed / "exported", max_shard_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 5
    found = transformers_logits(out)
    assert [kind for kind in KINDS if not torch.equal(found[kind], expected[kind])] == []
