"""What goes wrong with `vlmr1 convert`, as its user sees it: exit code 2, one line that says what, and nothing made."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlmr1.checkpoint import release
from megatron_vlmr1.checkpoint.convert import differences
from megatron_vlmr1.cli.main import main
from tests.checkpoints import write_random_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A model in two shards."""
    directory = write_random_checkpoint(tmp_path_factory.mktemp("failures") / "model", num_hidden_layers=2)
    size = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    return release.export(directory, directory.with_name("sharded"), max_shard_bytes=size * 3 // 5)


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def holder(model: Path, name: str = NAME) -> Path:
    """Return the shard that holds a tensor."""
    return model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def configure(model: Path, **settings: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def only_a_pickle(model: Path) -> None:
    for path in model.glob("model*"):
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")


# What is done to the model, and the line: {model} is its directory.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing_shard": (lambda m: (m / SHARDS[1]).unlink(), f"{{model}}/{SHARDS[1]}: not found"),
    "truncated": (lambda m: cut(m / SHARDS[0], -1), f"{{model}}/{SHARDS[0]}: not a readable safetensors file ("),
    "cut_header": (lambda m: cut(m / SHARDS[0], 50), f"{{model}}/{SHARDS[0]}: not a readable safetensors file ("),
    "empty": (lambda m: cut(m / SHARDS[0], 0), f"{{model}}/{SHARDS[0]}: not a readable safetensors file ("),
    "index": (
        lambda m: (m / "model.safetensors.index.json").write_text("{"),
        "{model}/model.safetensors.index.json: not a safetensors index (",
    ),
    "shape": (
        lambda m: change(holder(m), lambda t: t.update({NAME: torch.zeros(95, 64)})),
        f"{{model}}: {NAME} is [95, 64], but config.json asks for [96, 64]",
    ),
    "lacks": (
        lambda m: change(holder(m), lambda t: t.pop(NAME)),
        f"{{model}}: lacks tensor {NAME}; config.json says qwen2_5_vl",
    ),
    "extra": (
        lambda m: change(m / SHARDS[1], lambda t: t.update(extra=torch.zeros(1), zextra=torch.zeros(1))),
        "{model}: has unexpected tensor extra and 1 more; config.json says qwen2_5_vl",
    ),
    "architecture": (
        lambda m: configure(m, model_type="llava"),
        "{model}/config.json: model_type 'llava' is not supported; known: qwen2_5_vl",
    ),
    "config_number": (
        lambda m: configure(m, vision_config={"depth": 1}),
        "{model}/config.json: missing or malformed ",
    ),
    "no_json": (lambda m: (m / "config.json").write_text("{"), "{model}/config.json: not valid JSON ("),
    "no_config": (
        lambda m: (m / "config.json").unlink(),
        "{model}: no model in it; expected a Hugging Face directory, a checkpoint step_N or a run directory",
    ),
    "nowhere": (shutil.rmtree, "{model}: no such directory; expected a Hugging Face directory"),
    "pickle": (
        only_a_pickle,
        "{model}/model.safetensors: not found; pytorch_model.bin is a pickle: "
        "`vlmr1 convert safetensors {model} OUT` makes safetensors of it without running its code",
    ),
}
# Two directories are compared as they are, whatever their config.json asks for; a plan reads nothing else.
NOT_COMPARED = {"shape", "lacks", "extra", "architecture", "config_number"}
PLANNED = {"architecture", "config_number", "no_json", "no_config", "nowhere"}


def refusal(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a conversion that is refused; return its line."""
    capfd.readouterr()
    assert main(["convert", *map(str, words)]) == 2
    out, err = capfd.readouterr()
    *progress, line = err.splitlines(keepends=True)
    assert out == "" and line.startswith("vlmr1: error: ") and all(said.startswith("export ") for said in progress)
    return line.removeprefix("vlmr1: error: ")


@pytest.mark.parametrize("kind", BROKEN)
def test_export_of_a_broken_model(model, tmp_path, capfd, kind):
    spoil, line = BROKEN[kind]
    spoil(model)
    assert refusal(capfd, "export", model, tmp_path / "out").startswith(line.format(model=model))
    assert [*tmp_path.glob("out*")] == []


@pytest.mark.parametrize("kind", BROKEN)
def test_roundtrip_of_a_broken_model(model, tmp_path, capfd, kind):
    spoil, line = BROKEN[kind]
    spoil(model)
    assert refusal(capfd, "roundtrip", model, tmp_path / "out", "--tp", 2).startswith(line.format(model=model))
    assert [*tmp_path.glob("out*")] == []


@pytest.mark.parametrize("kind", sorted(BROKEN.keys() - NOT_COMPARED))
def test_verify_of_a_broken_model(whole, model, capfd, kind):
    spoil, line = BROKEN[kind]
    spoil(model)
    for sides in ((whole, model), (model, whole)):
        assert refusal(capfd, "verify", *sides).startswith(line.format(model=model))


@pytest.mark.parametrize("kind", sorted(PLANNED))
def test_plan_of_a_broken_model(model, capfd, kind):
    spoil, line = BROKEN[kind]
    spoil(model)
    said = refusal(capfd, "plan", model)
    if kind in ("no_config", "nowhere"):
        line = "{model}/config.json: not found; expected a Hugging Face model directory"
    assert said.startswith(line.format(model=model))


@pytest.mark.parametrize("verb", ["export", "roundtrip"])
def test_what_is_there_stays(model, tmp_path, capfd, verb):
    (out := tmp_path / "out").mkdir()
    (out / "mine").write_text("mine")
    assert refusal(capfd, verb, model, out) == f"{out}: exists already; name a new directory\n"
    assert (out / "mine").read_text() == "mine" and [*tmp_path.glob("out*")] == [out]


def test_somebody_elses_partial_stays(model, tmp_path, capfd):
    (partial := tmp_path / "out.partial").mkdir()
    line = f"{partial}: exists and was not left by an interrupted command; remove it or name another directory\n"
    assert refusal(capfd, "export", model, tmp_path / "out") == line
    assert [*tmp_path.glob("out*")] == [partial]


@pytest.mark.parametrize("verb", ["export", "roundtrip"])
def test_too_little_room(model, tmp_path, capfd, monkeypatch, verb):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    said = refusal(capfd, verb, model, tmp_path / "out")
    assert "GB are to be written, but the disk has 0.0 GB left" in said and str(tmp_path) in said
    assert [*tmp_path.glob("out*")] == []


class Full:
    """A file on a disk that has room for some bytes only."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room[0] -= len(data)
        if self._room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 100_000, 500_000])
def test_a_disk_that_fills_up_midway(model, tmp_path, capfd, monkeypatch, room):
    original, left = Path.open, [room]

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original(self, mode, *args, **kwargs)
        return Full(file, left) if self.name.endswith(".safetensors.partial") and "w" in mode else file

    out = tmp_path / "out"
    words = ("export", model, out, "--max-shard-size", "200KB")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        said = refusal(capfd, *words)
    assert said == f"{out}.partial: No space left on device; make room and give the same command again\n"
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.partial", "out.partial.json"]
    finished = {path: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert bool(finished) == (room == 500_000)
    assert main(["convert", *map(str, words)]) == 0  # it goes on where it stopped
    assert differences(model, out) == [] and [*tmp_path.glob("out*")] == [out]
    assert {(out / path.name).stat().st_ino for path in finished} == {*finished.values()}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_disk_that_is_full_for_the_last_files(model, tmp_path, capfd, monkeypatch, name):
    original = builtins.open if name == "config.json" else Path.write_text

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path) == tmp_path / "out.partial" / name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(*((builtins, "open") if name == "config.json" else (Path, "write_text")), failing)
        said = refusal(capfd, "export", model, tmp_path / "out", "--max-shard-size", "200KB")
    assert "out.partial: No space left on device; make room" in said and not (tmp_path / "out").exists()


def test_a_place_that_may_not_be_written(model, tmp_path, capfd):
    (file := tmp_path / "file").write_text("")
    for verb in ("export", "roundtrip"):
        assert str(file) in refusal(capfd, verb, model, file / "out")
