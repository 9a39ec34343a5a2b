"""Activation recomputation: the same gradients from fewer kept numbers."""

from __future__ import annotations

import pytest
import torch

from megatron_vlmr1 import config
from megatron_vlmr1.config import RecomputeConfig
from megatron_vlmr1.data.packing import PackedGroup, model_input, pack
from tests.checkpoints import mixed_prompts, write_random_checkpoint
from tests.distributed import plain, work
from tests.distributed.plain import within

LAYERS, BLOCKS = 4, 4  # of the language model and of the tower
CASES = {
    "core_attn": RecomputeConfig(granularity="selective"),
    "mlp": RecomputeConfig(granularity="selective", modules=["mlp"]),
    "both": RecomputeConfig(granularity="selective", modules=["core_attn", "mlp"]),
    "full": RecomputeConfig(granularity="full"),
    "pairs": RecomputeConfig(granularity="full", num_layers=2),
    "block": RecomputeConfig(granularity="full", method="block", num_layers=3),
    "tower": RecomputeConfig(tower=True),
    "everything": RecomputeConfig(granularity="full", tower=True),
}


class Measured:
    """One forward and backward pass of all prompts in one row: gradients, bytes kept, and which parts ran how often."""

    def __init__(self, directory, mesh, recompute: RecomputeConfig, frozen: bool = False) -> None:
        self.policy = policy = work.load_policy(directory, mesh, frozen, recompute=recompute)
        language, vision = policy.model.language, policy.model.vision
        layers = language.decoder.layers
        self.runs = dict.fromkeys(("layer", "core_attn", "mlp", "block"), 0)
        for name, modules in {
            "layer": layers,
            "core_attn": [layer.self_attention.core_attention for layer in layers],
            "mlp": [layer.mlp for layer in layers],
            "block": vision.blocks,
        }.items():
            for module in modules:
                module.register_forward_pre_hook(lambda *_, name=name: self._count(name))
        prompts = mixed_prompts(directory)
        batch = pack([PackedGroup(p, (), ()) for p in prompts], policy.shape.image_token_id, 1)
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = policy.model(model_input(batch, policy))
        self.kept_bytes = sum(kept.values())
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        hidden.backward(direction)
        named = policy.model.named_parameters()
        self.gradients = {name: p.grad for name, p in named if p.grad is not None}

    def _count(self, name: str) -> None:
        self.runs[name] += 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("recompute") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def kept(directory, mesh) -> Measured:
    return Measured(directory, mesh, RecomputeConfig())


@pytest.mark.parametrize(
    ("case", "again", "share"),
    [
        ("core_attn", {"core_attn": LAYERS}, 1.0),
        ("mlp", {"mlp": LAYERS}, 0.9),
        ("both", {"core_attn": LAYERS, "mlp": LAYERS}, 0.9),
        ("full", {"layer": LAYERS, "core_attn": LAYERS, "mlp": LAYERS}, 0.65),
        ("pairs", {"layer": LAYERS, "core_attn": LAYERS, "mlp": LAYERS}, 0.65),
        ("block", {"layer": 3, "core_attn": 3, "mlp": 3}, 0.75),
        ("tower", {"block": BLOCKS}, 0.9),
        ("everything", {"layer": LAYERS, "core_attn": LAYERS, "mlp": LAYERS, "block": BLOCKS}, 0.3),
    ],
)
def test_same_gradients_from_fewer_kept_bytes(directory, mesh, kept, case, again, share, record_property):
    found = Measured(directory, mesh, CASES[case])
    difference, name = plain.worst(found.gradients, kept.gradients)
    within(record_property, case, difference, 1e-6, name)
    missing = {name for name, _ in found.policy.model.named_parameters()} - found.gradients.keys()
    assert missing == {"language.output_layer.weight"}  # hidden states only
    once = {"layer": LAYERS, "core_attn": LAYERS, "mlp": LAYERS, "block": BLOCKS}
    assert kept.runs == once
    assert found.runs == {name: count + again.get(name, 0) for name, count in once.items()}
    record_property(f"kept bytes, {case}", (found.kept_bytes, kept.kept_bytes))
    assert found.kept_bytes < share * kept.kept_bytes


def test_nothing_runs_twice_without_a_backward(directory, mesh, tmp_path):
    measured = Measured(directory, mesh, CASES["everything"], frozen=True)
    assert measured.runs["block"] == BLOCKS  # a frozen tower
    before = dict(measured.runs)
    work.logits(measured.policy, mixed_prompts(directory), tmp_path / "logits.safetensors")
    assert measured.runs["layer"] - before["layer"] == LAYERS and not measured.policy.model.language.training


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"granularity": "none", "method": "block"}, "recompute: granularity=none does not take method"),
        ({"granularity": "selective", "num_layers": 2}, "granularity=selective does not take num_layers"),
        ({"granularity": "full", "modules": ["mlp"]}, "granularity=full does not take modules"),
        ({"granularity": "half"}, "recompute.granularity"),
    ],
)
def test_settings_that_would_do_nothing(settings, says):
    with pytest.raises(ValueError, match=says):
        work.settings(recompute=settings)


def test_units_divide_a_chunk(directory, mesh):
    with pytest.raises(ValueError, match="recompute.num_layers=3 does not divide the 4 layers of a pipeline chunk"):
        work.load_policy(directory, mesh, recompute=RecomputeConfig(granularity="full", num_layers=3))
    assert config.RecomputeConfig(granularity="full", method="block", num_layers=3).check([4]) is None
