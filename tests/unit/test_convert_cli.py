"""`vlmr1 convert` to and from torch_dist through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vlmr1.checkpoint.weights import HfWeights
from megatron_vlmr1.cli.main import main
from tests import jobs
from tests.checkpoints import write_random_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("cli") / "model", num_hidden_layers=3, vocab_size=501)


@pytest.fixture(scope="module")
def megatron(source) -> Path:
    assert main(["convert", "export", str(source), str(out := source.parent / "meg"), "--format", "torch_dist"]) == 0
    return out


def convert(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["convert", *map(str, words)])
    out, err = capfd.readouterr()
    return code, out, err


def test_there_and_back(capfd, source, megatron, tmp_path):
    back = tmp_path / "back"
    code, out, err = convert(capfd, "import", megatron, back)
    assert (code, out) == (0, f"{back}\n") and err.startswith("import ") and err.endswith(" left\n")
    assert convert(capfd, "verify", source, back) == (0, "the same tensors, bit for bit\n", "")


def test_other_names_another_type_and_small_shards(capfd, source, tmp_path):
    plain, back = tmp_path / "plain", tmp_path / "back"
    words = ("--format", "torch_dist", "--prefix", "", "--dtype", "bf16")
    assert convert(capfd, "export", source, plain, *words)[:2] == (0, f"{plain}\n")
    words = ("--config", source, "--max-shard-size", "100KB", "--dtype", "fp32")
    assert convert(capfd, "import", plain / "release", back, *words)[0] == 0
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 3
    name = "model.layers.2.mlp.down_proj.weight"
    before, after = HfWeights(source).tensor(name), HfWeights(back).tensor(name)
    assert torch.equal(before.bfloat16().float(), after)


def test_two_processes_share_the_files_out(capfd, source, megatron, tmp_path):
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    small = ("--max-shard-size", "100KB")
    code, said, err = convert(capfd, "export", source, exported, "--nproc", 2, *small)
    assert (code, said) == (0, f"{exported}\n") and " of " in err
    code, said = jobs.run_forked(2, "convert", "import", megatron, imported, *small)
    assert code == 0 and f"{imported}\n" in said and " of " in said
    for out in (exported, imported):
        assert len(list(out.glob("*.safetensors"))) > 3 and not list(out.glob("*.partial"))
        assert convert(capfd, "verify", source, out)[0] == 0
    out = tmp_path / "dist"
    code, said = jobs.run_forked(2, "convert", "export", source, out, "--format", "torch_dist", *small)
    assert code == 0 and f"{out}\n" in said
    assert len(list((out / "release").glob("__*_0.distcp"))) > 3 and not list(out.glob("**/*.partial"))
    assert convert(capfd, "import", out, tmp_path / "back")[0] == 0
    assert convert(capfd, "verify", source, tmp_path / "back")[0] == 0
    code, said = jobs.run_forked(2, "convert", "export", source, exported)
    assert code == 2 and "exists already; name a new directory" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("export {source} {out} --prefix x", "--prefix is for --format torch_dist"),
        ("export {source} {out} --nproc 0", "--nproc 0: at least one process"),
        ("export {megatron} {out}", "a Megatron checkpoint, of which `vlmr1 convert import"),
        ("verify {megatron} {source}", "a Megatron checkpoint, of which `vlmr1 convert import"),
        ("import {source} {out}", "no torch_dist checkpoint in it"),
        ("import {megatron} {source}", "exists already; name a new directory"),
    ],
)
def test_one_line(capfd, source, megatron, tmp_path, words, line):
    filled = words.format(source=source, megatron=megatron, out=tmp_path / "out").split()
    code, out, err = convert(capfd, *filled)
    assert (code, out) == (2, "") and line in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
