"""Export: recast, cut into shards, streamed, resumed, published only when every byte is proven."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlmr1.checkpoint import partial, release, tensorfile
from megatron_vlmr1.checkpoint.convert import differences
from megatron_vlmr1.checkpoint.release import export
from megatron_vlmr1.checkpoint.tensorfile import Entry
from megatron_vlmr1.checkpoint.weights import HfWeights
from tests.checkpoints import plain_model, random_prompt, write_random_checkpoint
from tests.distributed import plain

LIMIT = 100_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_random_checkpoint(tmp_path_factory.mktemp("release") / "model", seed=5)
    (directory / "LICENSE.txt").write_text("ours")
    (directory / "more").mkdir()
    (directory / "more" / "notes.json").write_text("{}")
    (directory / ".cache").mkdir()
    return directory


def test_bit_for_bit_in_small_shards_with_a_whole_index(source, tmp_path):
    out = export(source, tmp_path / "out", max_shard_bytes=LIMIT)
    assert differences(source, out) == []
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 5 and set(index["weight_map"].values()) == set(files)
    held = {name: load_file(out / name) for name in files}
    assert {k: v for v, tensors in held.items() for k in tensors} == index["weight_map"]
    sizes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= LIMIT or len(held[name]) == 1 for name, size in sizes.items())
    kept = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and p.suffix != ".safetensors"}
    made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.suffix != ".safetensors"}
    assert made - kept == {"model.safetensors.index.json"} and not kept - made
    assert all((source / name).read_bytes() == (out / name).read_bytes() for name in kept)


def test_transformers_computes_the_same_with_it(source, tmp_path):
    out = export(source, tmp_path / "out", max_shard_bytes=LIMIT)
    prompt = random_prompt(source, 0, 9)
    with torch.no_grad():
        a, b = (plain.logits(plain_model(directory), prompt) for directory in (source, out))
    assert torch.equal(a, b)


def test_recast(source, tmp_path):
    out = export(source, tmp_path / "out", dtype=torch.bfloat16)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    before, after = HfWeights(source), HfWeights(out)
    for name in before.names():
        assert torch.equal(after.tensor(name), before.tensor(name).to(torch.bfloat16)), name
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert len(differences(source, out)) == len(before.names())


def test_it_goes_on_where_it_was_interrupted(source, tmp_path, monkeypatch):
    out, write, seen = tmp_path / "out", tensorfile.write, []

    def failing(path, *rest):
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        seen.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(tensorfile, "write", failing)
    with pytest.raises(ValueError, match="partial: No space left on device; make room"):
        export(source, out, max_shard_bytes=LIMIT)
    assert not out.exists() and not list(out.with_name("out.partial").glob("*.index.json"))
    monkeypatch.setattr(tensorfile, "write", lambda path, *rest: (seen.append(path.name), write(path, *rest)))
    told: list[tuple[int, int]] = []
    export(source, out, max_shard_bytes=LIMIT, progress=lambda done, total: told.append((done, total)))
    assert len(seen) == len(set(seen)) and differences(source, out) == []
    assert 0 < told[0][0] < told[-1][0] == told[-1][1] and sorted(told) == told
    assert not out.with_name("out.partial").exists() and not (out / ".export.json").exists()


def test_another_source_starts_anew(source, tmp_path, monkeypatch):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(release, "write_index", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            export(source, out, max_shard_bytes=LIMIT)
    export(other, out)
    assert differences(other, out) == []


def test_refusals(source, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there: exists already; name a new directory"):
        export(source, tmp_path / "there")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ValueError, match="out.partial: exists and was not left by an interrupted command"):
        export(source, tmp_path / "out")
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match="but the disk has 0.0 GB left"):
        export(source, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_bytes_that_the_disk_changes_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda file, size, offset: bytes(size))
    entry = Entry("x", (3, 2), torch.float32)
    with pytest.raises(OSError, match="the disk gave back other bytes"):
        tensorfile.write(tmp_path / "a.safetensors", [entry], lambda _: [torch.zeros(3, 2)], lambda _: None)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_file_is_what_safetensors_reads(tmp_path):
    values = {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(()).double(),
        "d": torch.zeros(0, 4),
    }
    entries = [Entry(name, tuple(t.shape), t.dtype) for name, t in values.items()]
    tensorfile.write(
        tmp_path / "x.safetensors",
        entries,
        lambda e: values[e.name].split(2) if values[e.name].dim() else [values[e.name]],
        lambda _: None,
    )
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == values.keys() and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in values.items()
    )
    weights = HfWeights(tmp_path_with(tmp_path))
    assert torch.equal(torch.cat(list(weights.pieces("a", 24))), values["a"])


def tmp_path_with(directory: Path) -> Path:
    (directory / "x.safetensors").rename(directory / "model.safetensors")
    return directory
