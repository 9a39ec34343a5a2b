"""Hostile and damaged checkpoints of megatron-core: one line each, nothing run, nothing published."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_vlmr1.checkpoint.torch_dist import export_torch_dist, import_torch_dist
from tests.checkpoints import write_random_checkpoint

EMBEDDING = "language_model.embedding.word_embeddings.weight"
QKV = "language_model.decoder.layers.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("damage")
    return export_torch_dist(write_random_checkpoint(root / "model"), root / "megatron")


@pytest.fixture
def damaged(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "damaged"))


def rewrite(directory: Path, change: Callable[[Metadata], object]) -> None:
    path = directory / ".metadata"
    found = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["whole", "size", "info"])
def test_a_hostile_metadata_pickle_runs_nothing(damaged, tmp_path, where):
    mark = tmp_path / "mark"

    def change(found: Metadata) -> None:
        if where == "size":
            found.state_dict_metadata[EMBEDDING].size = Hostile(mark)
        else:
            found.storage_data[MetadataIndex(EMBEDDING, (0, 0))].relative_path = Hostile(mark)

    if where == "whole":
        (damaged / "release" / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    else:
        rewrite(damaged / "release", change)
    with pytest.raises(ValueError, match="refused before loading: asks for posix.system") as caught:
        import_torch_dist(damaged, tmp_path / "back")
    assert "\n" not in str(caught.value) and not mark.exists() and not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", 7, None])
def test_files_outside_are_never_opened(damaged, tmp_path, name):
    shutil.copy(damaged / "release" / "__0_0.distcp", damaged / "x")
    rewrite(
        damaged / "release", lambda m: vars(m.storage_data[MetadataIndex(EMBEDDING, (0, 0))]).update(relative_path=name)
    )
    with pytest.raises(ValueError, match="which is not a file of this directory|damaged: (Attribute|Type)Error"):
        import_torch_dist(damaged, tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_a_hostile_chunk_runs_nothing(damaged, tmp_path):
    mark, file = tmp_path / "mark", damaged / "release" / "__0_0.distcp"
    offset = file.stat().st_size
    with file.open("ab") as out:
        torch.save(Hostile(mark), out)
        length = out.tell() - offset
    rewrite(
        damaged / "release",
        lambda m: vars(m.storage_data[MetadataIndex(EMBEDDING, (0, 0))]).update(offset=offset, length=length),
    )
    with pytest.raises(ValueError, match=r"__0_0.distcp: language_model.embedding.* cannot be read: ") as caught:
        import_torch_dist(damaged, tmp_path / "back")
    assert "\n" not in str(caught.value) and not mark.exists() and not (tmp_path / "back").exists()


def chunk_of(found: Metadata, key: str, **new: Any) -> None:
    vars(found.state_dict_metadata[key].chunks[0]).update(new)


DAMAGE: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "compressed": (
        lambda m: vars(m.storage_data[MetadataIndex(EMBEDDING, (0, 0))]).update(transform_descriptors=["zstd"]),
        "is compressed, which is not supported",
    ),
    "hole": (lambda m: m.state_dict_metadata[QKV].chunks.pop(), "are not the whole of it"),
    "twice": (
        lambda m: m.state_dict_metadata[QKV].chunks.__setitem__(0, m.state_dict_metadata[QKV].chunks[1]),
        "leave a hole at|overlap at",
    ),
    "outside": (lambda m: chunk_of(m, EMBEDDING, offsets=torch.Size([1, 0])), "lies outside"),
    "negative": (lambda m: chunk_of(m, EMBEDDING, offsets=(-1, 0)), "whole number"),
    "huge": (lambda m: chunk_of(m, EMBEDDING, sizes=(1 << 80, 64)), "whole number"),
    "axes": (lambda m: chunk_of(m, EMBEDDING, sizes=(512,)), "another number of axes"),
    "no place": (lambda m: m.storage_data.clear(), "damaged: KeyError"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", 3), "damaged: (Attribute|Type)Error"),
    "type": (lambda m: setattr(m.state_dict_metadata[EMBEDDING].properties, "dtype", "x"), "the type of"),
    "other type": (
        lambda m: setattr(m.state_dict_metadata[EMBEDDING].properties, "dtype", torch.bfloat16),
        "but the metadata says",
    ),
    "integers": (
        lambda m: setattr(m.state_dict_metadata[EMBEDDING].properties, "dtype", torch.int32),
        "is of type torch.int32; known: ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_metadata(damaged, tmp_path, kind):
    change, words = DAMAGE[kind]
    rewrite(damaged / "release", change)
    with pytest.raises(ValueError, match=words) as caught:
        import_torch_dist(damaged, tmp_path / "back")
    assert "\n" not in str(caught.value) and str(damaged / "release") in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_missing_and_truncated_files(damaged, exported, tmp_path):
    inner = damaged / "release"
    file = inner / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(ValueError, match=r"__0_0.distcp: truncated: \d+ bytes of at least \d+$"):
        import_torch_dist(damaged, tmp_path / "back")
    file.unlink()
    with pytest.raises(ValueError, match=r"__0_0.distcp: not found, but .*\.metadata names it"):
        import_torch_dist(damaged, tmp_path / "back")
    (inner / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata: not found; not a megatron-core checkpoint"):
        import_torch_dist(damaged, tmp_path / "back")
    with pytest.raises(ValueError, match="no torch_dist checkpoint in it; expected .metadata, or latest_"):
        import_torch_dist(inner, tmp_path / "back")
    (damaged / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    with pytest.raises(ValueError, match=r"says '\.\./elsewhere', which is neither a number nor 'release'"):
        import_torch_dist(damaged, tmp_path / "back")
    shutil.rmtree(Path(moved := shutil.copytree(exported, tmp_path / "moved")) / "huggingface")
    with pytest.raises(ValueError, match=r"no huggingface/config.json in or beside it; name the model's with --con"):
        import_torch_dist(Path(moved), tmp_path / "back")
    assert not list(tmp_path.glob("back*"))
