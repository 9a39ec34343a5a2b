"""Metadata of distributed checkpoints is a pickle: nothing of it may run."""

from __future__ import annotations

import builtins
import importlib
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_vlmr1.checkpoint.pickles import guarded, read_metadata

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Hostile:
    """Unpickled, calls `function`."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(mark: Path) -> dict[str, object]:
    return {
        "os.system": Hostile(os.system, f"touch {mark}"),
        "subprocess": Hostile(subprocess.call, ["touch", str(mark)]),
        "eval": Hostile(eval, f"open({str(mark)!r}, 'w')"),
        "open": Hostile(builtins.open, str(mark), "w"),
        "import": Hostile(importlib.import_module, "antigravity"),
        "getattr": Hostile(getattr, "text", "upper"),
        "torch.load": Hostile(torch.load, str(mark)),
        "deep": {"state": [({"x": (1, Hostile(os.system, f"touch {mark}"))},)]},
    }


@pytest.mark.parametrize("kind", attacks(Path()))
def test_a_hostile_metadata_file_is_refused_and_nothing_runs(tmp_path, kind):
    mark = tmp_path / "mark"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(attacks(mark)[kind]))
    with pytest.raises(ValueError, match="refused before loading") as caught, guarded(tmp_path):
        pytest.fail("the block was entered")
    assert "\n" not in str(caught.value) and str(tmp_path / ".metadata") in str(caught.value)
    assert not mark.exists() and FORCE not in os.environ


def test_the_attacks_would_work(tmp_path):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(attacks(mark)["os.system"]))
    assert mark.exists()


@pytest.mark.parametrize(
    "words",
    [
        b"cposix\nsystem\n(S'touch mark'\ntR.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'touch mark'\ntR.",
        b"ctorch\nSize.__class__\n.",
        b"ctorch\nload\n.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cmegatron_vlmr1.checkpoint.pickles\nguarded\n.",
    ],
)
def test_hand_made_opcodes(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(words)
    with pytest.raises(ValueError, match="asks for"), guarded(tmp_path):
        pytest.fail("the block was entered")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_paths_are_plain_wherever_python_keeps_them(tmp_path, module):
    (tmp_path / ".metadata").write_bytes(b"c" + module + b"\nPosixPath\n(S'/somewhere'\ntR.")
    assert read_metadata(tmp_path) == Path("/somewhere")


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04\x95", b"\xff" * 64, pickle.dumps([1])[:-2]])
def test_damaged_metadata(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="refused before loading"), guarded(tmp_path):
        pytest.fail("the block was entered")


def test_no_metadata(tmp_path):
    with pytest.raises(ValueError, match="not a megatron-core checkpoint"), guarded(tmp_path):
        pytest.fail("the block was entered")


@pytest.fixture
def plain_metadata(tmp_path) -> Path:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    return tmp_path


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_within_the_block_torch_load_builds_known_types_only(plain_metadata, monkeypatch, before):
    monkeypatch.delenv(FORCE, raising=False)
    if before is not None:
        monkeypatch.setenv(FORCE, before)
    mark = plain_metadata / "mark"
    torch.save({"a": torch.ones(2), "b": Hostile(os.system, f"touch {mark}")}, plain_metadata / "common.pt")
    torch.save({"a": torch.ones(2)}, plain_metadata / "plain.pt")
    with guarded(plain_metadata):
        assert torch.load(plain_metadata / "plain.pt", weights_only=False)["a"].sum() == 2
        with pytest.raises(Exception, match="(?i)weights.only"):
            torch.load(plain_metadata / "common.pt", weights_only=False)
    assert not mark.exists()
    assert os.environ.get(FORCE) == before


def test_the_setting_is_restored_after_an_error(plain_metadata, monkeypatch):
    monkeypatch.delenv(FORCE, raising=False)
    with pytest.raises(KeyError), guarded(plain_metadata):
        raise KeyError("x")
    assert FORCE not in os.environ
