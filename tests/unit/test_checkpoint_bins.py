"""`convert safetensors`: pickled checkpoints, bit for bit, and none of their code."""

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
from safetensors.torch import load_file

from megatron_vlmr1.checkpoint.convert import differences
from megatron_vlmr1.cli.main import main
from tests.checkpoints import write_random_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("bins") / "model", seed=11)


@pytest.fixture
def tensors(model) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture
def source(model, tmp_path) -> Path:
    """The model's directory without weights."""
    return Path(shutil.copytree(model, tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors")))


def refused(capfd: pytest.CaptureFixture[str], source: Path) -> str:
    """Return the one line with which a conversion is refused; it leaves nothing."""
    out = source.with_name("out")
    assert main(["convert", "safetensors", str(source), str(out)]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and str(source) in said and not [*source.parent.glob("out*")]
    return said


def newer(name: str) -> str:
    """Return a published name as newer transformers has it."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("rename", [str, newer], ids=["published", "newer"])
@pytest.mark.parametrize("kind", ["one", "sharded", "parameters"])
def test_bit_for_bit(model, source, tensors, capfd, rename, kind):
    named: dict[str, Any] = {rename(name): tensor for name, tensor in tensors.items()}
    assert ("model.language_model.norm.weight" in named) == (rename is newer)
    if kind == "sharded":
        first, second = sorted(named)[::2], sorted(named)[1::2]
        for i, names in enumerate((first, second), start=1):
            torch.save({name: named[name] for name in names}, source / f"pytorch_model-0000{i}-of-00002.bin")
        torch.save({"never": "read"}, source / "pytorch_model-old.bin")
        where = {name: f"pytorch_model-0000{1 if name in first else 2}-of-00002.bin" for name in named}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        make = torch.nn.Parameter if kind == "parameters" else torch.Tensor.clone
        torch.save({name: make(tensor) for name, tensor in named.items()}, source / "pytorch_model.bin")
    out = source.with_name("out")
    assert main(["convert", "safetensors", str(source), str(out)]) == 0
    assert capfd.readouterr().out == f"{out}\n" and differences(model, out) == []
    sides = {path.name for path in model.iterdir() if path.suffix != ".safetensors"}
    assert {path.name for path in out.iterdir()} == {*sides, "model.safetensors"}


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("beside", [False, True])
def test_a_hostile_pickle_is_not_run(source, tensors, tmp_path, capfd, beside):
    trace = tmp_path / "ran"
    torch.save({**(tensors if beside else {}), NAME: Hostile(trace)}, source / "pytorch_model.bin")
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # it would
    trace.unlink()
    assert f"pytorch_model.bin: refused without running its code: asks for {os.name}.system" in refused(capfd, source)
    assert not trace.exists()


def cut(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-5000])


def broken_inside(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, path)
    content = path.read_bytes()
    at = content.index(b"data.pkl") + 100
    path.write_bytes(content[:at] + bytes(200) + content[at + 200 :])


DAMAGES: dict[str, tuple[Callable[[Path, dict[str, Any]], object], str]] = {
    "cut": (cut, "pytorch_model.bin: damaged, or not a file that torch.save makes since version 1.6"),
    "inside": (broken_inside, "pytorch_model.bin: refused without running its code: "),
    "empty": (lambda path, _: path.write_bytes(b""), "pytorch_model.bin: damaged, or not a file"),
    "bare": (lambda path, t: path.write_bytes(pickle.dumps({"a": 1})), "pytorch_model.bin: damaged, or not a file"),
    "none": (lambda path, _: None, "pytorch_model.bin: not found"),
    "list": (lambda path, t: torch.save([*t.values()], path), "pytorch_model.bin: holds list, not tensors by name"),
    "nested": (lambda path, t: torch.save({"model": t}, path), "'model' is dict, not a plain tensor under a name"),
    "number": (lambda path, t: torch.save({3: t[NAME]}, path), "'3' is Tensor, not a plain tensor under a name"),
    "meta": (lambda path, t: torch.save({NAME: t[NAME].to("meta")}, path), f"'{NAME}' is Tensor, not a plain tensor"),
    "sparse": (lambda path, t: torch.save({NAME: t[NAME].to_sparse()}, path), f"'{NAME}' is Tensor, not a plain"),
    "ints": (lambda path, t: torch.save({NAME: t[NAME].int()}, path), f"{NAME} is of type torch.int32; known: BF16"),
    "lacks": (lambda path, t: torch.save({k: v for k, v in t.items() if k != NAME}, path), f"lacks tensor {NAME}; "),
    "extra": (lambda path, t: torch.save({**t, "x": t[NAME]}, path), "has unexpected tensor x; config.json says"),
    "shape": (lambda path, t: torch.save({**t, NAME: t[NAME][1:]}, path), f"{NAME} is [95, 64], but config.json asks"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_refused(source, tensors, capfd, damage):
    write, line = DAMAGES[damage]
    write(source / "pytorch_model.bin", tensors)
    assert line in refused(capfd, source)


@pytest.mark.parametrize(
    "content", ["{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "b"}}']
)
def test_a_broken_index(source, capfd, content):
    (source / "pytorch_model.bin.index.json").write_text(content)
    line = "/b: not found" if '"b"' in content else "index.json: not an index of weights ("
    assert line in refused(capfd, source)
