"""Layer specs without a GPU: which one is chosen, the te spec's names, and that both hold the same model.

Transformer Engine can't be imported here; `tests.te_modules` stands in for its modules.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint import scaling, state, weights
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.config import PrecisionConfig, RecomputeConfig
from megatron_vlmr1.config.rules import for_answers
from megatron_vlmr1.data.packing import MicroBatch, PackedGroup, pack
from megatron_vlmr1.grpo.update import Updater, label_tensors
from megatron_vlmr1.models import specs
from megatron_vlmr1.models.attention import CoreAttention
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.layers import transformer_config
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.specs import Layers, layers
from megatron_vlmr1.models.vlm import build_chunks
from megatron_vlmr1.parallel import mesh as meshes
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.rollout.forward import Forward
from megatron_vlmr1.runtime import device
from tests import recipes, te_modules
from tests.checkpoints import banned_ids, mixed_prompts, write_random_checkpoint
from tests.distributed import ranks, work

DELAYED = PrecisionConfig(fp8="delayed", amax_history_len=4)
# A layer of the te spec, as megatron-core 0.16.1 names its parameters: read from its definitions, not from a GPU.
TE_LAYER = {
    "self_attention.linear_proj.weight": ("hidden", "heads / tp"),
    "self_attention.linear_qkv.layer_norm_weight": ("hidden",),
    "self_attention.linear_qkv.weight": ("qkv / tp", "hidden"),
    "self_attention.linear_qkv.bias": ("qkv / tp",),
    "mlp.linear_fc1.layer_norm_weight": ("hidden",),
    "mlp.linear_fc1.weight": ("2 ffn / tp", "hidden"),
    "mlp.linear_fc2.weight": ("hidden", "ffn / tp"),
}
WIDTHS = {  # recorded, at TP8
    "32b": {"hidden": 5120, "heads / tp": 640, "qkv / tp": 896, "2 ffn / tp": 6912, "ffn / tp": 3456},
    "72b": {"hidden": 8192, "heads / tp": 1024, "qkv / tp": 1280, "2 ffn / tp": 7392, "ffn / tp": 3696},
}


def settings(spec: str = "auto", fp8: str = "none") -> config.Config:
    return config.parse(
        {"model": {"path": "-", "spec": spec}, "data": {"train": "-"}, "precision": {"fp8": fp8}}, "test"
    )


@pytest.fixture
def machine(monkeypatch):
    """Pretend a machine: whether there is CUDA, Transformer Engine, and which capability."""

    def pretend(cuda: bool, engine: bool, capability: tuple[int, int] = (9, 0), version: str = "13.0") -> None:
        monkeypatch.setattr(device, "has_cuda", lambda: cuda)
        monkeypatch.setattr(device, "capability", lambda: capability)
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(device, "name", lambda: "NVIDIA A100-SXM4-80GB")
        found = SimpleNamespace() if engine else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "engine", "spec", "chosen"),
    [
        (True, True, "auto", "te"),
        (True, True, "torch", "torch"),
        (True, True, "te", "te"),
        (True, False, "auto", "torch"),
        (False, True, "auto", "torch"),
        (False, False, "auto", "torch"),
        (False, False, "torch", "torch"),
    ],
)
def test_the_spec_that_a_machine_gets(machine, cuda, engine, spec, chosen):
    machine(cuda, engine)
    assert layers(settings(spec)) == Layers(chosen)


@pytest.mark.parametrize(
    ("cuda", "engine", "capability", "spec", "fp8", "says"),
    [
        (True, False, (9, 0), "te", "none", "^model.spec=te needs Transformer Engine, which is not installed: .*cuda"),
        (True, False, (9, 0), "auto", "delayed", "^precision.fp8=delayed needs Transformer Engine, which is not inst"),
        (
            False,
            True,
            (9, 0),
            "te",
            "none",
            "^model.spec=te: Transformer Engine needs a GPU, and this rank has no",
        ),
        (False, True, (9, 0), "auto", "tensorwise", "^precision.fp8=tensorwise: Transformer Engine needs a GPU"),
        (True, True, (8, 0), "auto", "tensorwise", "fp8=tensorwise needs a GPU of compute capability 8.9 .*A100.*8.0"),
        (True, True, (8, 9), "auto", "blockwise", "fp8=blockwise needs a GPU of compute capability 9.0"),
    ],
)
def test_a_machine_that_lacks_something(machine, cuda, engine, capability, spec, fp8, says):
    machine(cuda, engine, capability)
    with pytest.raises(ValueError, match=says):
        layers(settings(spec, fp8))


def test_evaluation_needs_nothing_that_only_training_computes_with(machine, tmp_path, capsys):
    """A run's config is evaluated wherever there is a CPU; what it is refused for here is a split that is not there."""
    machine(False, False)
    words = ["data.evaluate.heldout=nowhere", "precision.dtype=bf16", "precision.fp8=blockwise", "model.spec=te"]
    words += [f"run_dir={tmp_path}", "optimizer.moments_dtype=fp8"]
    assert main(["evaluate", "configs/quickstart.yaml", *words]) == 2
    assert "nowhere: no such directory" in capsys.readouterr().err
    raw = {"model": {"path": "-", "spec": "te"}, "data": {"train": "-"}, "optimizer": {"moments_dtype": "bf16"}}
    asked = config.parse(raw | {"precision": {"fp8": "delayed", "amax_history_len": 4}}, "test")
    assert layers(for_answers(asked)) == Layers("torch", PrecisionConfig())


def test_fp8_on_a_gpu_that_has_it(machine):
    machine(True, True, (8, 9))
    assert layers(settings(fp8="delayed")) == Layers("te", PrecisionConfig(fp8="delayed"))
    machine(True, True, (9, 0))
    assert layers(settings("te", "blockwise")).precision.fp8 == "blockwise"
    machine(True, True, (9, 0), "12.8")
    with pytest.raises(ValueError, match="precision.fp8=blockwise needs CUDA 12.9, but torch is built for 12.8"):
        layers(settings("te", "blockwise"))
    assert layers(settings("te", "tensorwise")).precision.fp8 == "tensorwise"


@pytest.mark.parametrize("size", WIDTHS)
def test_names_and_shapes_of_the_te_spec_at_full_size(monkeypatch, size):
    """The last rank of TP8 PP2, without memory: the recorded table, and the torch spec's pieces under its names."""
    device.prepare_megatron()
    te_modules.install(monkeypatch)
    shape, layout = read_shape(recipes.published(size)), recipes.layout(8, 2)
    with meshes.pretending():
        mesh = meshes.pretended(layout, 7, 1)
        with meshes.building_for(mesh), device.without_memory():
            built = {
                spec: build_chunks(shape, mesh, torch.bfloat16, RecomputeConfig(), Layers(spec))[0]
                for spec in ("torch", "te")
            }
        parts = {spec: list(weights.parameter_pieces(chunk)) for spec, chunk in built.items()}
    named = {name: tuple(p.shape) for name, p in built["te"].language.named_parameters()}
    number = shape.text.num_layers // 2
    expected = {
        f"decoder.layers.{i}.{name}": tuple(WIDTHS[size][side] for side in sides)
        for i in range(number)
        for name, sides in TE_LAYER.items()
    }
    hidden = WIDTHS[size]["hidden"]
    expected |= {"decoder.final_layernorm.weight": (hidden,), "output_layer.weight": (152064 // 8, hidden)}
    assert named == expected
    tables = {
        spec: {part.name: (tuple(part.parameter.shape), part.pieces) for part in found} for spec, found in parts.items()
    }
    assert tables["te"] == tables["torch"]


@pytest.mark.parametrize("mlp_is_a_function", [False, True])
def test_modules_of_the_te_spec_in_either_form_of_megatron_cores(monkeypatch, mlp_is_a_function):
    """0.16 specifies a layer's MLP as a module, 0.19 as a function that builds it."""
    device.prepare_megatron()
    te_modules.install(monkeypatch)
    local = specs.get_gpt_layer_local_spec

    def spec(**options):
        layer = local(**options)
        mlp = specs._submodules(layer.submodules.mlp)
        layer.submodules.mlp = partial(MLP, submodules=mlp) if mlp_is_a_function else ModuleSpec(MLP, submodules=mlp)
        return layer

    monkeypatch.setattr(specs, "get_gpt_layer_local_spec", spec)
    block = specs.block_spec(2, "te")
    made = block.layer_specs[0].submodules
    attention, mlp = made.self_attention.submodules, specs._submodules(made.mlp)
    assert len(block.layer_specs) == 2 and made.input_layernorm is made.pre_mlp_layernorm is IdentityOp
    assert attention.linear_qkv is mlp.linear_fc1 is te_modules.LayerNormColumnParallelLinear
    assert attention.linear_proj is mlp.linear_fc2 is te_modules.RowParallel
    assert attention.core_attention is CoreAttention


def test_an_engine_that_megatron_core_cannot_import():
    """Here none is installed: megatron-core's modules are stand-ins that build nothing."""
    device.prepare_megatron()
    with pytest.raises(ValueError, match="^megatron-core cannot use the Transformer Engine .* or use model.spec=torch"):
        specs.block_spec(1, "te")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def policy(directory, mesh, made: Layers) -> Policy:
    out = Policy(read_shape(directory), mesh, torch.float32, banned_ids(directory), layers=made)
    weights.load(out.chunks, weights.HfWeights(directory))
    return out


def test_both_specs_hold_and_compute_the_same(monkeypatch, directory, tmp_path):
    """Weights out of one directory, back into published tensors, logits, and what generation reads."""
    te_modules.install(monkeypatch)
    with ranks.alone() as mesh:
        made = {spec: policy(directory, mesh, Layers(spec)) for spec in ("torch", "te")}
        assert hasattr(made["te"].model.language.decoder.layers[0].mlp.linear_fc1, "layer_norm_weight")
        for spec, one in made.items():
            work.write_weights(one, directory, tmp_path / spec)
            work.logits(one, mixed_prompts(directory)[:2], tmp_path / spec / "logits.safetensors")
        files = sorted(path.name for path in (tmp_path / "torch").iterdir())
        assert "logits.safetensors" in files and "model.safetensors" in files
        for name in (name for name in files if name.endswith(".safetensors")):
            ours, theirs = load_file(tmp_path / "te" / name), load_file(tmp_path / "torch" / name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
        seen = {spec: Forward(one, 16).chunks for spec, one in made.items()}
        for ours, theirs in zip(seen["te"][0], seen["torch"][0], strict=True):
            assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in vars(ours))


def gradients(directory, mesh, made: Layers) -> tuple[Policy, dict[str, torch.Tensor]]:
    """Sum of log-probs of two micro-batches: the gradients in the buffers, by parameter."""
    one = policy(directory, mesh, made)
    one.wrap_for_training()
    updater = Updater(one, parallel_optimizer.build(work.settings().optimizer, one.ddp), work.settings())
    for chunk in one.ddp:
        chunk.zero_grad_buffer()
    batches = [
        pack([PackedGroup(prompt, (np.arange(7, 19), np.arange(31, 40)), (0, 1))], one.shape.image_token_id, 1)
        for prompt in mixed_prompts(directory)[:2]
    ]

    def loss(hidden: torch.Tensor, batch: MicroBatch):
        return one.logprobs(hidden, *label_tensors(batch))[0].sum(), {}

    updater._run(one.ddp, batches, loss)
    return one, {part.name: part.parameter.main_grad.clone() for part in weights.parameter_pieces(one.model)}


def test_gradients_of_both_specs_are_the_same(monkeypatch, directory):
    """The te spec's matrices add theirs to the buffers themselves; nothing is added twice, and nothing left out."""
    te_modules.install(monkeypatch)
    with ranks.alone() as mesh:
        _, expected = gradients(directory, mesh, Layers("torch"))
        one, found = gradients(directory, mesh, Layers("te"))
        added = {part.name for part in weights.parameter_pieces(one.model) if part.parameter.grad_added_to_main_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max(), name
    matrices = {name for name in found if ".linear_" in name and name.endswith(".weight") and "norm" not in name}
    assert len(matrices) == 2 * 4 and added == matrices


def test_what_the_te_spec_fuses(monkeypatch):
    """The torch spec fuses nothing, and builds where there are no kernels; te says so where they are missing."""
    names = [field.name for field in dataclasses.fields(TransformerConfig) if field.name.endswith("_fusion")]
    assert {"apply_rope_fusion", "bias_activation_fusion", "gradient_accumulation_fusion"} <= set(names)

    def fused(spec: str) -> set[str]:
        device.prepare_megatron()
        shape = read_shape(recipes.published("7b"))
        with meshes.pretending():
            mesh = meshes.pretended(recipes.layout(4, 2), 0, 0)
            made = transformer_config(shape.text, mesh, torch.bfloat16, RecomputeConfig(), None, spec)
        return {name for name in names if getattr(made, name)}

    assert fused("torch") == set()
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        fused("te")
    te_modules.install(monkeypatch)
    assert fused("te") == {"apply_rope_fusion", "bias_activation_fusion"}


def trained(directory, mesh, made: Layers):
    one = policy(directory, mesh, made)
    optimizer = parallel_optimizer.build(work.settings().optimizer, one.wrap_for_training())
    generator = torch.Generator().manual_seed(1)
    for part in sorted(weights.parameter_pieces(one.model), key=lambda part: part.name):  # alike in both specs
        part.parameter.main_grad.copy_(torch.randn(part.parameter.shape, generator=generator))
    optimizer.step()
    return one, optimizer


def masters(one: Policy, optimizer) -> dict[str, torch.Tensor]:
    """Optimizer moments by parameter, under names that both specs have."""
    (inner,) = optimizer.chained_optimizers
    out = {}
    for part in weights.parameter_pieces(one.model):
        group, index = inner.model_param_group_index_map[part.parameter]
        shard = inner.optimizer.param_groups[group]["params"][index]
        out[part.name] = inner.optimizer.state[shard]["exp_avg"].clone()
    return out


@pytest.mark.parametrize(("before", "after"), [("torch", "te"), ("te", "torch")])
def test_optimizer_state_of_one_spec_goes_on_in_the_other(monkeypatch, directory, tmp_path, before, after):
    te_modules.install(monkeypatch)
    with ranks.alone() as mesh:
        one, optimizer = trained(directory, mesh, Layers(before))
        expected = masters(one, optimizer)
        for kind in state.FORMATS:
            (tmp_path / kind).mkdir()
            progress = {"config": {"parallel": {}}, "layer_spec": before}
            state.save(one, optimizer, progress, tmp_path / kind, kind)
        other = policy(directory, mesh, Layers(after))
        fresh = parallel_optimizer.build(work.settings().optimizer, other.wrap_for_training())
        state.load(other, fresh, tmp_path / "fully_reshardable")
        found = masters(other, fresh)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        with pytest.raises(ValueError, match=f"at model.spec={before}, not {after}: resume with that, or save once"):
            state.load(other, fresh, tmp_path / "dp_reshardable")


def run_delayed(one: Policy) -> None:
    """Leave what a pass in delayed scaling leaves."""
    recipe = SimpleNamespace(amax_history_len=4)
    for i, module in enumerate(m for m in one.model.modules() if isinstance(m, te_modules.Scaled)):
        module.fp8_meta["num_gemms"] = 1
        module.init_fp8_meta_tensors(recipe)
        for direction in ("scaling_fwd", "scaling_bwd"):
            module.fp8_meta[direction].scale += i
            module.fp8_meta[direction].amax_history.normal_()


def test_delayed_scales_are_saved_and_restored(monkeypatch, directory, tmp_path, caplog):
    """As tensors, without a pickle; on another layout, or with another length of history, they begin anew."""
    te_modules.install(monkeypatch)
    recipe = SimpleNamespace(amax_history_len=4)
    monkeypatch.setattr(state, "get_fp8_recipe", lambda config: recipe)
    with ranks.alone() as mesh:
        one, optimizer = trained(directory, mesh, Layers("te", DELAYED))
        (tmp_path / "bf16").mkdir()
        state.save(one, optimizer, {}, tmp_path / "bf16")
        assert not scaling.path(tmp_path / "bf16", 0).exists()
        run_delayed(one)
        (tmp_path / "fp8").mkdir()
        state.save(one, optimizer, {}, tmp_path / "fp8")
        expected = scaling.remembered(one.chunks)
        assert len(expected) == 2 * 4 * 4  # layers, modules, tensors
        fresh, other = trained(directory, mesh, Layers("te", DELAYED))
        state.load(fresh, other, tmp_path / "fp8")
        found = scaling.remembered(fresh.chunks)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert "begins anew" not in caplog.text
        state.load(fresh, other, tmp_path / "bf16")
        assert "bf16: no FP8 scales of this layout and history: scaling begins anew" in caplog.text
        file = scaling.path(tmp_path / "fp8", 0)
        assert not scaling.restore(fresh.chunks, replace(mesh, world=2, dp_size=2), file, lambda: recipe)
        assert not scaling.restore(fresh.chunks, mesh, file, lambda: SimpleNamespace(amax_history_len=16))
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match="fp8_00000.safetensors: not a readable safetensors file"):
            state.load(fresh, other, tmp_path / "fp8")
