"""Reading Hugging Face directories: slices, and one clear line for each directory that is not this model."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlmr1.checkpoint import weights, writer
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.models.families import published_name, read_shape
from megatron_vlmr1.models.families.qwen2_5_vl import ALIASES, tensor_shapes, text_pieces
from megatron_vlmr1.models.pieces import Piece
from megatron_vlmr1.models.shape import padded
from tests.checkpoints import write_random_checkpoint
from tests.distributed import plain, work


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("weights") / "model", seed=3)


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def change(directory: Path, edit) -> None:
    """Rewrite the tensors of a directory."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory: Path) -> str:
    """Return the line with which the directory is refused."""
    with pytest.raises(ValueError, match=".") as caught:
        HfWeights(directory).check(read_shape(directory))
    line = str(caught.value)
    assert "\n" not in line and str(directory) in line
    return line


def test_the_whole_directory_is_what_the_architecture_asks_for(source):
    hf = HfWeights(source)
    shape = read_shape(source)
    hf.check(shape)
    expected = tensor_shapes(shape)
    assert hf.names() == set(expected)
    assert {name: tuple(hf.tensor(name).shape) for name in hf.names()} == expected


def test_a_missing_tensor(copy):
    change(copy, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    assert "lacks tensor model.layers.2.mlp.up_proj.weight" in refused(copy)


def test_an_unexpected_tensor(copy):
    change(copy, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2), "x": torch.zeros(1)}))
    assert "has unexpected tensor model.layers.9.mlp.up_proj.weight and 1 more" in refused(copy)


def test_a_wrong_shape(copy):
    change(copy, lambda t: t.update({"visual.merger.mlp.2.bias": torch.zeros(65)}))
    assert "visual.merger.mlp.2.bias is [65], but config.json asks for [64]" in refused(copy)


def test_a_config_of_another_size(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 6
    (copy / "config.json").write_text(json.dumps(config))
    assert "lacks tensor model.layers.4.input_layernorm.weight and 23 more; config.json says qwen2_5_vl" in refused(
        copy
    )


def test_another_model(copy):
    (copy / "model.safetensors").unlink()
    save_file({"transformer.h.0.attn.c_attn.weight": torch.zeros(2, 2)}, copy / "model.safetensors")
    assert "lacks tensor lm_head.weight and 104 more" in refused(copy)


def test_only_a_pickle(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    way = f"`vlmr1 convert safetensors {copy} OUT` makes safetensors of it without running its code"
    assert f"model.safetensors: not found; pytorch_model.bin is a pickle: {way}" in refused(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert refused(copy).endswith("model.safetensors: not found")


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_cut_file(copy, size):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "not a readable safetensors file" in refused(copy)


def test_no_safetensors_at_all_inside(copy):
    (copy / "model.safetensors").write_bytes(pickle.dumps({"a": 1}) * 100)
    assert "not a readable safetensors file" in refused(copy)


def sharded(directory: Path) -> Path:
    """Cut the weights into two files with an index; return the index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        where |= dict.fromkeys(part, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_shards(copy, source):
    sharded(copy)
    HfWeights(copy).check(read_shape(copy))
    before, after = plain.read(source), plain.read(copy)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_missing_shard(copy):
    sharded(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: not found" in refused(copy)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'])
def test_a_broken_index(copy, content):
    sharded(copy).write_text(content)
    assert "index" in refused(copy)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname"])
def test_an_index_does_not_lead_out_of_the_directory(copy, name):
    index = sharded(copy)
    shutil.copy(copy / "model-00001-of-00002.safetensors", copy.parent / "outside.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    where = {key: name if file.startswith("model-00001") else file for key, file in where.items()}
    index.write_text(json.dumps({"weight_map": where}))
    assert f"{Path(name).name}: not found" in refused(copy)


def test_names_of_newer_transformers(copy, source):
    def rename(tensors) -> None:
        for name in list(tensors):
            inner = name.removeprefix("model.")
            new = f"model.{name}" if name.startswith("visual.") else f"model.language_model.{inner}"
            if not name.startswith("lm_head."):
                tensors[new] = tensors.pop(name)

    change(copy, rename)
    HfWeights(copy).check(read_shape(copy))
    assert all(torch.equal(t, plain.read(copy)[name]) for name, t in plain.read(source).items())
    assert published_name("model.language_model.norm.weight", ALIASES) == "model.norm.weight"
    assert published_name("model.visual.merger.ln_q.weight", ALIASES) == "visual.merger.ln_q.weight"
    assert published_name("lm_head.weight", ALIASES) == "lm_head.weight"


def test_load_and_save_in_one_process(source, mesh, tmp_path):
    policy = work.load_policy(source, mesh)
    work.write_weights(policy, source, tmp_path / "again")
    before, after = plain.read(source), plain.read(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()


def test_small_shards(source, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 200_000)
    work.write_weights(work.load_policy(source, mesh), source, tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    before, after = plain.read(source), plain.read(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tied_directory_may_hold_the_output_layer_too(tmp_path, mesh):
    directory = write_random_checkpoint(tmp_path / "tied", tied=True)
    change(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    policy = work.load_policy(directory, mesh)
    assert torch.equal(policy.model.output_weight(), plain.read(directory)["model.embed_tokens.weight"])


def test_a_directory_of_another_model_changes_no_weight(source, copy, mesh):
    policy = work.load_policy(source, mesh)
    before = [p.detach().clone() for p in policy.model.parameters()]
    change(copy, lambda t: t.update({"visual.blocks.0.attn.qkv.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match="visual.blocks.0.attn.qkv.bias is"):
        weights.load(policy.chunks, HfWeights(copy))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "settings",
    [{}, {"vocab_size": 501}, {"intermediate_size": 90}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}],
)
def test_pieces_of_all_ranks_cover_every_tensor_once(tmp_path, tp, settings):
    from tests.tiny import write_tiny_checkpoint_files

    shape = read_shape(write_tiny_checkpoint_files(tmp_path / "files", **settings))
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
    names += [] if shape.text.tied else ["output_layer.weight"]
    inner = ["self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "self_attention.linear_proj.weight"]
    inner += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight"]
    sizes = {n: s for n, s in tensor_shapes(shape).items() if not n.startswith("visual.")}
    seen: dict[str, list[Piece]] = {name: [] for name in sizes}
    padding = 0
    for name, layer in [*((n, None) for n in names), *((n, i) for n in inner for i in range(shape.text.num_layers))]:
        pieces = [text_pieces(shape, name, layer, rank, tp) for rank in range(tp)]
        assert len({sum(p.stop - p.start for p in part) for part in pieces}) == 1  # ranks hold equal shares
        replicated = name.endswith("layernorm.weight")
        for piece in pieces[0] if replicated else [p for part in pieces for p in part]:
            if piece.name is None:
                padding += piece.stop - piece.start
            else:
                seen[piece.name].append(piece)
    for name, pieces in seen.items():
        covered = [i for p in pieces for i in range(p.start, p.stop)]
        assert sorted(covered) == list(range(sizes[name][pieces[0].dim])), name
    units = padded(shape.text.ffn_hidden_size, tp) - shape.text.ffn_hidden_size  # of gate, up and down in each layer
    rows = (padded(shape.text.vocab_size, tp) - shape.text.vocab_size) * (1 if shape.text.tied else 2)
    assert padding == rows + 3 * units * shape.text.num_layers
