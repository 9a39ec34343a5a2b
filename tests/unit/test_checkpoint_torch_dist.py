"""Hugging Face directories to megatron-core's checkpoints and back, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vlmr1.checkpoint import partial, release, tensorfile, torch_dist, torch_dist_files
from megatron_vlmr1.checkpoint.convert import differences
from megatron_vlmr1.checkpoint.torch_dist import export_torch_dist, import_torch_dist
from megatron_vlmr1.checkpoint.torch_dist_files import Chunk, Reader
from megatron_vlmr1.checkpoint.torch_dist_names import parts
from megatron_vlmr1.checkpoint.torch_dist_write import Files
from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.models.families import read_shape
from tests.checkpoints import write_random_checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "odd": {"vocab_size": 501, "intermediate_size": 90, "num_hidden_layers": 7, "num_key_value_heads": 1},
}
EMBEDDING = "language_model.embedding.word_embeddings.weight"
QKV = "language_model.decoder.layers.self_attention.linear_qkv.weight"


def in_bf16(directory: Path) -> Path:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("torch_dist")
    for seed, (name, settings) in enumerate(KINDS.items()):
        write_random_checkpoint(root / name, seed=seed, **settings)
    (root / "untied" / "LICENSE.txt").write_text("ours")
    in_bf16(root / "odd")
    return root


@pytest.fixture(scope="module")
def exported(sources) -> Path:
    return export_torch_dist(sources / "untied", sources / "untied_megatron")


def metadata(directory: Path) -> Metadata:
    return pickle.loads((directory / ".metadata").read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_bit_for_bit(sources, tmp_path, kind):
    told: list[tuple[int, int]] = []
    middle = export_torch_dist(sources / kind, tmp_path / "m", progress=lambda *done: told.append(done))
    size = sum(t.nbytes for t in load_file(sources / kind / "model.safetensors").values())
    assert told == sorted(told) and told[0] == (0, size) and told[-1] == (size, size)
    assert sorted(path.name for path in middle.iterdir()) == [
        "huggingface",
        "latest_checkpointed_iteration.txt",
        "release",
    ]
    assert (middle / "latest_checkpointed_iteration.txt").read_text() == "release"
    names = {path.name for path in (middle / "release").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__0_nothing.distcp", "common.pt", "metadata.json"}
    for number, source in enumerate((middle, middle / "release")):
        back = import_torch_dist(source, tmp_path / f"back{number}", max_shard_bytes=100_000)
        assert differences(sources / kind, back) == []
        assert len([*back.glob("model-*.safetensors")]) > 5 and (back / "model.safetensors.index.json").is_file()
        side = [path for path in (sources / kind).iterdir() if path.suffix != ".safetensors"]
        assert all((back / path.name).read_bytes() == path.read_bytes() for path in side)


def test_keys_and_layout_are_megatrons(exported, sources):
    found = metadata(exported / "release")
    sizes = {k: tuple(v.size) for k, v in found.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    layers = "language_model.decoder.layers."
    assert {key: size for key, size in sizes.items() if not key.startswith("visual.")} == {
        EMBEDDING: (512, 64),
        layers + "self_attention.linear_qkv.layer_norm_weight": (4, 64),
        layers + "self_attention.linear_qkv.weight": (4, 128, 64),
        layers + "self_attention.linear_qkv.bias": (4, 128),
        layers + "self_attention.linear_proj.weight": (4, 64, 64),
        layers + "mlp.linear_fc1.layer_norm_weight": (4, 64),
        layers + "mlp.linear_fc1.weight": (4, 192, 64),
        layers + "mlp.linear_fc2.weight": (4, 64, 96),
        "language_model.decoder.final_layernorm.weight": (64,),
        "language_model.output_layer.weight": (512, 64),
    }
    tensors = load_file(sources / "untied" / "model.safetensors")
    visual = {key: size for key, size in sizes.items() if key.startswith("visual.")}
    names = {name.removeprefix("model."): tuple(t.shape) for name, t in tensors.items() if "visual." in name}
    assert visual == names


def test_torchs_own_reader_finds_the_rows(exported, sources):
    hf = HfWeights(sources / "untied")
    state = {
        QKV: torch.zeros(4, 128, 64),
        "language_model.decoder.layers.mlp.linear_fc1.weight": torch.zeros(4, 192, 64),
        "visual.merger.mlp.0.weight": torch.zeros(128, 128),
    }
    torch_checkpoint.load(state, storage_reader=torch_checkpoint.FileSystemReader(exported / "release"), no_dist=True)
    qkv, fc1, merger = state.values()
    q, k, v = (hf.tensor(f"model.layers.2.self_attn.{x}_proj.weight") for x in "qkv")
    assert torch.equal(qkv[2], torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]]))
    gate, up = (hf.tensor(f"model.layers.3.mlp.{x}_proj.weight") for x in ("gate", "up"))
    assert torch.equal(fc1[3], torch.cat([gate, up]))
    assert torch.equal(merger, hf.tensor("visual.merger.mlp.0.weight"))


def test_what_megatron_lm_looks_for_beside_the_tensors(exported):
    import megatron.core  # noqa: F401 - tells torch that Namespace is harmless

    common = torch.load(exported / "release" / "common.pt", weights_only=True)
    assert common["args"].tensor_model_parallel_size == common["args"].pipeline_model_parallel_size == 1
    assert common["checkpoint_version"] == 3.0 and common["content_metadata"]["non_homogeneous_layers"] is False
    assert json.loads((exported / "release" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_no_prefix(sources, tmp_path):
    middle = export_torch_dist(sources / "tied", tmp_path / "m", prefix="")
    assert EMBEDDING.removeprefix("language_model.") in metadata(middle / "release").state_dict_metadata
    assert differences(sources / "tied", import_torch_dist(middle, tmp_path / "back")) == []


def test_recast_both_ways(sources, tmp_path):
    middle = export_torch_dist(sources / "untied", tmp_path / "m", torch.bfloat16)
    back = import_torch_dist(middle, tmp_path / "back")
    again = import_torch_dist(middle, tmp_path / "again", dtype=torch.float32)
    weights, first, second = HfWeights(sources / "untied"), HfWeights(back), HfWeights(again)
    for name in weights.names():
        rounded = weights.tensor(name).bfloat16()
        assert torch.equal(first.tensor(name), rounded) and torch.equal(second.tensor(name), rounded.float())
    words = [json.loads((path / "config.json").read_text())["dtype"] for path in (middle / "huggingface", back, again)]
    assert words == ["bfloat16", "bfloat16", "float32"]


def test_types_that_differ_within_one_tensor_ask_for_one(sources, tmp_path):
    mixed = Path(shutil.copytree(sources / "untied", tmp_path / "mixed"))
    tensors = load_file(mixed / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.k_proj.weight"))
    save_file({**tensors, name: tensors[name].bfloat16()}, mixed / "model.safetensors")
    with pytest.raises(ValueError, match=r"k_proj.weight is torch.bfloat16, other parts .* name one type with --dtype"):
        export_torch_dist(mixed, tmp_path / "m")
    export_torch_dist(mixed, tmp_path / "m", torch.float32)


def test_no_larger_piece_is_ever_asked_for(sources, tmp_path, monkeypatch):
    limit, seen = 2048, []
    rows, read = HfWeights.rows, Reader.read

    def counted(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.nbytes)
        return values

    monkeypatch.setattr(torch_dist, "_PIECE_BYTES", limit)
    monkeypatch.setattr(release, "_PIECE_BYTES", limit)
    monkeypatch.setattr(HfWeights, "rows", lambda *a: counted(rows(*a)))
    middle = export_torch_dist(sources / "odd", tmp_path / "m")
    chunks = [c for t in Reader(middle / "release").tensors.values() for c, _ in t.chunks]
    row = 3 * 2 * 14 * 14 * 2  # bytes of the tower's widest, which is one piece
    assert max(seen) == row > limit and sorted(set(seen))[-2] <= limit and len(seen) > 400
    assert max(2 * torch.Size(c.size).numel() for c in chunks if not c.key.startswith("visual.patch")) <= limit
    seen.clear()
    monkeypatch.setattr(Reader, "read", lambda *a: counted(read(*a)))
    back = import_torch_dist(middle, tmp_path / "back")
    assert max(seen) == row and sorted(set(seen))[-2] <= limit
    assert differences(sources / "odd", back) == []


def test_chunks_are_loaded_once_and_forgotten(exported, monkeypatch):
    reader, loads, most = Reader(exported / "release"), [], [0]
    load = torch_dist_files.load
    monkeypatch.setattr(torch_dist_files, "load", lambda *a: (loads.append(a[0]), load(*a))[1])
    whole = reader.read(Chunk.rows(QKV, (1,), 0, 128, (64,)))
    loads.clear()
    bands = [reader.read(Chunk.rows(QKV, (1,), start, start + 32, (64,))) for start in range(0, 128, 32)]
    assert torch.equal(torch.cat(bands, dim=1), whole) and len(loads) == 1 and not reader._kept
    monkeypatch.setattr(torch_dist_files, "_KEPT_BYTES", 1)
    for layer in range(4):
        reader.read(Chunk.rows(QKV, (layer,), 0, 1, (64,)))
        most[0] = max(most[0], len(reader._kept))
    assert most == [1]


def split(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Write an export again through torch's own writer, its tensors changed."""
    found = metadata(source / "release").state_dict_metadata.items()
    state = {key: torch.zeros(value.size) for key, value in found if isinstance(value, TensorStorageMetadata)}
    torch_checkpoint.load(state, storage_reader=torch_checkpoint.FileSystemReader(source / "release"), no_dist=True)
    torch_checkpoint.save(change(state), checkpoint_id=out / "iter_0000100", no_dist=True)
    (out / "latest_checkpointed_iteration.txt").write_text("100\n")
    return out


def numbered(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `non_homogeneous_layers` writes, with norms apart and gate and up two tensors."""
    apart = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    out = {}
    for key, value in state.items():
        before, _, name = key.partition("decoder.layers.")
        if not name:
            out[key] = value
        for i in range(len(value) if name else 0):
            if name == "mlp.linear_fc1.weight":
                gate, up = value[i].chunk(2)
                out |= {f"{before}decoder.layers.{i}.{name}_w": gate, f"{before}decoder.layers.{i}.{name}_v": up}
            else:
                out[f"{before}decoder.layers.{i}.{apart.get(name, name)}"] = value[i]
    return out


def padded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    keys = (EMBEDDING, "language_model.output_layer.weight")
    more = {key: torch.cat([state[key], torch.ones(24, 64)]) for key in keys}
    more |= {"optimizer.state.exp_avg.x": torch.ones(3), "chained_0.optimizer.y": torch.ones(2)}
    return {**state, **more, f"{QKV.removesuffix('weight')}_extra_state/shard_0_4": b"some object"}  # type: ignore[dict-item]


@pytest.mark.parametrize("change", [numbered, padded])
def test_other_ways_to_write_the_same(exported, sources, tmp_path, change):
    written = split(exported, tmp_path / "other", change)
    with pytest.raises(ValueError, match=r"name the model's with --config HF_DIR"):
        import_torch_dist(written, tmp_path / "back")
    back = import_torch_dist(written, tmp_path / "back", sources / "untied")
    assert differences(sources / "untied", back) == []


def test_unknown_names_are_refused(exported, sources, tmp_path):
    renamed = split(exported, tmp_path / "a", lambda state: {"module." + key: v for key, v in state.items()})
    with pytest.raises(ValueError, match=r"no tensor .*; found module\.language_model\..*, module\.language_model"):
        import_torch_dist(renamed, tmp_path / "back", sources / "untied")
    more = split(exported, tmp_path / "b", lambda state: {**state, "language_model.decoder.extra": torch.ones(2)})
    with pytest.raises(ValueError, match="has unexpected tensor language_model.decoder.extra; config.json says qwen"):
        import_torch_dist(more, tmp_path / "back", sources / "untied")
    towerless = split(exported, tmp_path / "c", lambda s: {k: v for k, v in s.items() if not k.startswith("visual.")})
    with pytest.raises(ValueError, match="lacks tensor visual.patch_embed.proj.weight$"):
        import_torch_dist(towerless, tmp_path / "back", sources / "untied")
    less = split(exported, tmp_path / "d", lambda state: {k: v for k, v in state.items() if k != QKV})
    with pytest.raises(ValueError, match=r"lacks tensor language_model\.decoder.*linear_qkv\.weight \(layer 0\)$"):
        import_torch_dist(less, tmp_path / "back", sources / "untied")
    with pytest.raises(ValueError, match=r"has unexpected tensor language_model\.output_layer"):
        import_torch_dist(exported, tmp_path / "back", sources / "tied")
    with pytest.raises(ValueError, match=r"\[512, 64\], but config.json asks for \[520, 64\]"):
        wider = Path(shutil.copytree(exported / "huggingface", tmp_path / "wider"))
        config = (wider / "config.json").read_text().replace('"vocab_size": 512', '"vocab_size": 520')
        (wider / "config.json").write_text(config)
        import_torch_dist(exported, tmp_path / "back", wider)
    assert not list(tmp_path.glob("back*"))


def test_changed_bytes_are_noticed_before_they_get_their_name(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda file, size, offset: bytes(size))
    with pytest.raises(OSError, match="the disk gave back other bytes than were written"):
        export_torch_dist(sources / "untied", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not [*tmp_path.glob("*/release/*.distcp")]


def test_torch_s_own_word_for_a_disk_that_fills_up(sources, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        save, calls = torch.save, []

        def failing(*arguments: Any) -> None:
            calls.append(1)
            if len(calls) == 20:
                raise RuntimeError("[enforce fail at inline_container.cc:860] . PytorchStreamWriter failed\nwriting")
            save(*arguments)

        patch.setattr(torch, "save", failing)
        with pytest.raises(OSError, match=r"__0_0.distcp.partial: cannot be written: .*failed writing$"):
            export_torch_dist(sources / "untied", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    middle = export_torch_dist(sources / "untied", tmp_path / "m")
    assert differences(sources / "untied", import_torch_dist(middle, tmp_path / "back")) == []
    assert not (tmp_path / "m.partial").exists()


@pytest.mark.parametrize("lost", ["nothing", "a note", "a file"])
def test_an_interrupted_export_goes_on(sources, tmp_path, monkeypatch, lost):
    """Three files are whole when it stops; what a crash of the machine may take of them is made again."""
    write, seen = Files.write, []

    def failing(self: Files, number: int, *rest: Any) -> None:
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        seen.append(number)
        write(self, number, *rest)

    place, told = tmp_path / "m.partial", []
    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", failing)
        with pytest.raises(ValueError, match="partial: No space left on device; make room"):
            export_torch_dist(sources / "untied", tmp_path / "m", max_file_bytes=50_000)
    if lost == "a note":
        (place / "notes" / "1.json").unlink()
    if lost == "a file":
        (place / "release" / "__1_0.distcp").unlink()
    monkeypatch.setattr(Files, "write", lambda self, number, *rest: (seen.append(number), write(self, number, *rest)))
    middle = export_torch_dist(
        sources / "untied", tmp_path / "m", progress=lambda *done: told.append(done), max_file_bytes=50_000
    )
    count = len([*(middle / "release").glob("__*_0.distcp")])
    assert seen == [0, 1, 2, *([] if lost == "nothing" else [1]), *range(3, count)] and count > 10
    assert told == sorted(told) and 0 < told[0][0] < told[-1][0] == told[-1][1]
    assert not [*middle.glob("notes*")] and not place.exists()
    assert differences(sources / "untied", import_torch_dist(middle, tmp_path / "back")) == []


def test_an_interrupted_import_goes_on(exported, sources, tmp_path, monkeypatch):
    write, seen = tensorfile.write, []

    def failing(path: Path, *rest: Any) -> None:
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        seen.append(path.name)
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "write", failing)
        with pytest.raises(ValueError, match="partial: No space left on device; make room"):
            import_torch_dist(exported, tmp_path / "back", max_shard_bytes=100_000)
    assert not (tmp_path / "back").exists()
    monkeypatch.setattr(tensorfile, "write", lambda path, *rest: (seen.append(path.name), write(path, *rest)))
    back = import_torch_dist(exported, tmp_path / "back", max_shard_bytes=100_000)
    assert len(seen) == len(set(seen)) and differences(sources / "untied", back) == []


def test_refusals(exported, sources, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for call, source in ((export_torch_dist, sources / "untied"), (import_torch_dist, exported)):
        with pytest.raises(ValueError, match="there: exists already; name a new directory"):
            call(source, tmp_path / "there")
    (tmp_path / "m.partial").mkdir()
    for call, source in ((export_torch_dist, sources / "untied"), (import_torch_dist, exported)):
        with pytest.raises(ValueError, match="m.partial: exists and was not left by an interrupted command"):
            call(source, tmp_path / "m")
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    for call, source in ((export_torch_dist, sources / "untied"), (import_torch_dist, exported)):
        with pytest.raises(ValueError, match=r"are to be written, but the disk has 0\.0 GB left"):
            call(source, tmp_path / "full")
        assert not (tmp_path / "full").exists()


def test_every_part_of_the_published_models_has_its_name():
    root = Path(__file__).resolve().parents[2] / "configs" / "model"
    directories = sorted(path.parent for path in root.glob("*/config.json"))
    assert len(directories) == 4
    for directory in directories:
        shape = read_shape(directory)
        found = parts(shape)
        assert len({(part.key, part.layer) for part in found}) == len(found)
