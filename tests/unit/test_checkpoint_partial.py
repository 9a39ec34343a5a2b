"""Conversions that are interrupted, disturbed or misled: nothing is mixed, nothing lies where it should not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlmr1.checkpoint import coverage
from megatron_vlmr1.checkpoint.convert import differences
from megatron_vlmr1.checkpoint.partial import making
from megatron_vlmr1.checkpoint.pickles import read_metadata
from megatron_vlmr1.checkpoint.release import export
from megatron_vlmr1.checkpoint.torch_dist import export_torch_dist, import_torch_dist
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.parallel import mesh as meshes
from megatron_vlmr1.runtime import device
from tests import recipes
from tests.checkpoints import write_random_checkpoint

SMALL = 100_000


class Stop(Exception):
    pass


def stop_after(pieces: int):
    """Return a progress function that interrupts the work."""
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) > pieces:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("partial") / "model")


@pytest.fixture(scope="module")
def megatron(model) -> Path:
    return export_torch_dist(model, model.with_name("megatron"))


def test_an_import_with_another_config_begins_anew(megatron, model, tmp_path):
    other = Path(shutil.copytree(megatron / "huggingface", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    (other / "config.json").write_text(json.dumps(config))  # all tensors have the same shapes, and mean other rows
    with pytest.raises(Stop):
        import_torch_dist(megatron, tmp_path / "out", other, None, SMALL, stop_after(30))
    assert len([*(tmp_path / "out.partial").glob("*.safetensors")]) > 2
    assert differences(model, import_torch_dist(megatron, tmp_path / "out", None, None, SMALL)) == []


def test_two_at_once(model, tmp_path):
    with making(tmp_path / "out", "plan") as place:
        (place / "mine").touch()
        with pytest.raises(ValueError, match="out: another process is making it"):
            export(model, tmp_path / "out")
        assert (place / "mine").exists()
    assert differences(model, export(model, tmp_path / "out")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_interrupted_as_it_gets_its_name(model, tmp_path, monkeypatch):
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        export(model, tmp_path / "out", max_shard_bytes=SMALL)
    monkeypatch.undo()
    written = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.safetensors")}
    out = export(model, tmp_path / "out", max_shard_bytes=SMALL)
    assert {path.name: path.stat().st_ino for path in out.glob("*.safetensors")} == written and len(written) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("form", ["hf", "torch_dist"])
def test_not_into_what_it_is_made_of(model, capfd, form):
    before = sorted(model.rglob("*"))
    assert main(["convert", "export", str(model), str(model / "inner" / "out"), "--format", form]) == 2
    assert "out: lies in" in capfd.readouterr().err and sorted(model.rglob("*")) == before


def test_links_out_of_a_megatron_checkpoint_are_not_followed(megatron, tmp_path):
    (tmp_path / "secret").write_text("secret")
    moved = Path(shutil.copytree(megatron, tmp_path / "moved"))
    (moved / "huggingface" / "more").mkdir()
    (moved / "huggingface" / "more" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.txt: a link out of the checkpoint"):
        import_torch_dist(moved, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_metadata_cannot_change_classes(tmp_path):
    evil = b"cpathlib\nPosixPath\n(N}S'name'\nS'elsewhere'\nstb."
    (tmp_path / ".metadata").write_bytes(evil)
    with pytest.raises(ValueError, match="refused before loading: sets attributes of something that is no record"):
        read_metadata(tmp_path)
    assert Path("a/b").name == "b"


def test_looking_takes_no_memory_of_a_gpu(monkeypatch):
    device.prepare_megatron()
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    shape = read_shape(recipes.published("3b"))
    with meshes.pretending():
        chunks = coverage._build(shape, ParallelConfig(tensor_model_parallel_size=2), 1, 0)
    assert {p.device.type for chunk in chunks for p in chunk.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("num_attention_heads", 0, "missing or malformed"),
        ("num_hidden_layers", "4", "num_layers: '4' is not a positive whole number"),
        ("num_hidden_layers", 4.0, "num_layers: 4.0 is not a positive whole number"),
        ("num_key_value_heads", 0, "num_kv_heads: 0 is not a positive whole number"),
        ("hidden_size", -64, "hidden_size: -64 is not a positive whole number"),
        ("rope_parameters", {"rope_theta": "x", "mrope_section": [2, 3, 3]}, "missing or malformed"),
        (None, [], "missing or malformed"),
    ],
)
def test_a_malformed_config(model, tmp_path, capfd, key, value, line):
    config = json.loads((model / "config.json").read_text())
    config["text_config"] = value if key is None else config["text_config"] | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["convert", "plan", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert f"{tmp_path}/config.json: missing or malformed" in said and line in said and said.count("\n") == 1


def test_verify_compares_single_numbers(model, tmp_path):
    for i, value in enumerate((1.0, 2.0)):
        shutil.copytree(model, tmp_path / str(i))
        tensors = load_file(model / "model.safetensors") | {"x": torch.tensor(value)}
        save_file(tensors, tmp_path / str(i) / "model.safetensors", metadata={"format": "pt"})
    assert differences(tmp_path / "0", tmp_path / "0") == []
    assert differences(tmp_path / "0", tmp_path / "1") == ["x: largest difference 1"]
