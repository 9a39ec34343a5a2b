"""`vlmr1 convert` on a disk that fills up midway: exit code 2, one line, nothing under the name that was asked for.

What is written to ``/dev/full`` gets the kernel's own "No space left on device".
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlmr1.checkpoint import release, store, writer
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.parallel import mesh
from megatron_vlmr1.runtime import distributed
from tests import jobs
from tests.checkpoints import write_random_checkpoint

LINE = "No space left on device; make room and give the same command again"
LIMIT = "200KB"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("full") / "model", seed=4, num_hidden_layers=2)


def convert(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str]]:
    """Run a conversion; return its exit code and what it said besides progress."""
    capfd.readouterr()
    code = main(["convert", *map(str, words)])
    out, err = capfd.readouterr()
    assert (out == "") == (code != 0)
    # Nor what a torch that is built for CUDA says where there is none.
    said = [line for line in err.splitlines() if "No CUDA runtime is found" not in line]
    return code, [line for line in said if not line.startswith("export ")]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_on_the_second_of_two_processes(model, tmp_path, capfd):
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done:
            raise Stopped

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Stopped):
        release.export(model, out, max_shard_bytes=200_000, progress=stop)  # it leaves its plan, and no shard
    count = len([*release.export(model, tmp_path / "other", max_shard_bytes=200_000).glob("*.safetensors")])
    full = partial / f"{writer.shard_name(2, count)}.partial"  # every second one is the second process's
    full.symlink_to("/dev/full")
    words = ("export", model, out, "--max-shard-size", LIMIT)
    code, said = jobs.run_forked(2, "convert", *words)
    assert code == 2 and [line for line in said.splitlines() if "error" in line] == [f"vlmr1: error: {partial}: {LINE}"]
    assert not out.exists() and (done := len([*partial.glob("*.safetensors")])) >= 1
    full.unlink()
    assert convert(capfd, *words) == (0, []) and done < count == len([*out.glob("*.safetensors")])
    before, after = tensors_of(model), tensors_of(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_under_torch_s_own_writer(model, tmp_path, capfd, monkeypatch):
    original = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return original(Path("/dev/full") if self.name == "__0_0.distcp.partial" and "w" in mode else self, mode, *args)

    out = tmp_path / "out"
    words = ("export", model, out, "--format", "torch_dist")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        assert convert(capfd, *words) == (2, [f"vlmr1: error: {out}.partial: {LINE}"])
    assert not out.exists() and convert(capfd, *words) == (0, [])


@pytest.fixture
def rank(monkeypatch):
    """Be the only rank of a job."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield
    mesh.destroy()
    distributed.stop()


@pytest.mark.parametrize("where", ["weights", "flush"])
def test_under_the_ranks_of_a_roundtrip(model, tmp_path, capfd, monkeypatch, rank, where):
    def write_shard(file: Path, tensors: Any) -> None:
        file.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush_tree(directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "weights":
        monkeypatch.setattr(writer, "_write_shard", write_shard)
    else:
        monkeypatch.setattr(store, "flush_tree", flush_tree)
    out = tmp_path / "out"
    assert convert(capfd, "roundtrip", model, out) == (2, [f"vlmr1: error: {out}: {LINE}"])
    assert [*tmp_path.iterdir()] == []
