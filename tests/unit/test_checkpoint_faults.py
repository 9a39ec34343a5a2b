"""A real checkpoint of a tiny model: death at every file operation of a save, bit flips, cuts, hostile pickles."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vlmr1.checkpoint import state, weights
from megatron_vlmr1.checkpoint import store as store_module
from megatron_vlmr1.checkpoint.pickles import read_metadata
from megatron_vlmr1.checkpoint.store import MANIFEST, verify
from tests.checkpoints import write_random_checkpoint
from tests.distributed import ranks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A policy in training, and a run directory with its checkpoint of step 1 (in dp_reshardable) in `base`."""
    root = tmp_path_factory.mktemp("faults")
    source = write_random_checkpoint(root / "weights", num_hidden_layers=1)
    with ranks.alone() as mesh, torch.random.fork_rng():
        from tests import saves  # imports megatron-core, which `alone` has prepared

        policy, optimizer = saves.in_training(source, mesh)
        actor: Any = SimpleNamespace(policy=policy, directory=source)
        out = SimpleNamespace(
            mesh=mesh, policy=policy, optimizer=optimizer, actor=actor, saves=saves, base=root / "run"
        )
        save(out, out.base, 1, "old", async_save=False)
        yield out


def save(tiny: SimpleNamespace, run_dir: Path, step: int, mark: str, **train: Any) -> None:
    """Save to the end, with a mark that tells which save it is."""
    checkpoints = tiny.saves.checkpoints_of(run_dir, tiny.mesh, **train)
    checkpoints.save(tiny.actor, tiny.optimizer, tiny.saves.progress(step, checkpoints, mark=mark), {})
    checkpoints.close()


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Died(BaseException):
    """What a process that is no more would not notice."""


class Death:
    """From file operation `at` on, counted from 1 while it is armed, nothing reaches the disk any more."""

    CHANGES = ("mkdir", "rename", "replace", "remove", "unlink", "rmdir", "symlink", "truncate", "chmod", "fsync")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: int | None = None
        self.count = 0
        for name in self.CHANGES:
            monkeypatch.setattr(os, name, self._before(getattr(os, name)))
        monkeypatch.setattr(os, "open", self._before(os.open, lambda _, flags, *__, **___: flags & WRITES))
        opened = self._before(io.open, lambda _, mode="r", *__, **___: set(mode) & set("wxa+"))
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)

    def arm(self, at: int) -> None:
        self.at, self.count = at, 0

    def disarm(self) -> None:
        self.at = None

    def _before(self, original: Any, writes: Any = lambda *_, **__: True) -> Any:
        """Count calls that write; what a dead process has written is in the page cache and stays."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if writes(*args, **kwargs):
                self._operation()
            return original(*args, **kwargs)

        return call

    def _operation(self) -> None:
        if self.at is not None:
            self.count += 1
            if self.count >= self.at:
                raise Died


@pytest.mark.parametrize("async_save", [False, True], ids=["at once", "in threads"])
@pytest.mark.parametrize("step", [1, 2], ids=["a step that is there", "a new step"])
def test_death_at_every_file_operation(tiny, tmp_path, monkeypatch, record_property, step, async_save):
    death = Death(monkeypatch)
    train = {"async_save": async_save, "keep_checkpoints": 1}
    recovered = old = 0
    for k in range(1, 500):
        run = Path(shutil.copytree(tiny.base, tmp_path / str(k), symlinks=True))
        death.arm(k)
        try:
            save(tiny, run, step, "new", **train)
            finished = True
        except Died:
            finished = False
        finally:
            death.disarm()
        found = tiny.saves.checkpoints_of(run, tiny.mesh).newest()
        assert found is not None, f"nothing is left after a death at operation {k}"
        mark = json.loads((found / "state/progress.json").read_text())["mark"]
        assert (found.name, mark) in [("step_1", "old"), (f"step_{step}", "new")]
        assert sorted(path.name for path in (run / "checkpoints").iterdir() if "-" in path.name) == []
        shutil.rmtree(run)
        if finished:
            break
        recovered += 1
        old += mark == "old"
    assert mark == "new" and recovered == k - 1
    assert recovered > 60 and 0 < old < recovered  # deaths before and after the publishing
    record_property("figure", f"{recovered}/{k - 1} recoverable, K = {k - 1}")
    print(f"{recovered}/{k - 1} recoverable")


@pytest.fixture
def two(tiny, tmp_path) -> Any:
    """Checkpoints of a run that has those of step 1 and of step 2."""
    shutil.copytree(tiny.base, tmp_path / "run", symlinks=True)
    save(tiny, tmp_path / "run", 2, "new", async_save=False)
    return tiny.saves.checkpoints_of(tmp_path / "run", tiny.mesh)


def test_every_bit_flip_and_every_cut_is_refused_and_named(two):
    path, rng = two.store.path(2), random.Random(4)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) >= 14
    refused = 0
    for i in range(250):
        file = files[i % len(files)]
        whole = file.read_bytes()
        assert whole
        if i < 200:
            place = rng.randrange(len(whole))
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << rng.randrange(8)
        else:
            spoiled = bytearray(whole[: rng.randrange(len(whole))])
        file.write_bytes(spoiled)
        said: list[str] = []
        assert two.store.newest_valid(said.append) == (1, two.store.path(1)), (file, i)
        assert len(said) == 1 and file.relative_to(path).as_posix() in said[0], said
        file.write_bytes(whole)
        refused += 1
    assert refused == 250
    assert two.store.newest_valid() == (2, path)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def payloads(mark: Path) -> dict[str, bytes]:
    """Bytes that run a command in whoever unpickles them, in the forms that torch reads."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"optimizer": Hostile(mark)}, zipped)
    torch.save({"optimizer": Hostile(mark)}, legacy, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(Hostile(mark)), "zip": zipped.getvalue(), "legacy": legacy.getvalue()}


def test_the_payloads_would_work(tmp_path):
    for name, data in payloads(tmp_path / "mark").items():
        if name == "pickle":
            pickle.loads(data)
        else:
            torch.load(io.BytesIO(data), weights_only=False)
        assert (tmp_path / "mark").exists(), name
        (tmp_path / "mark").unlink()


def sign(path: Path) -> None:
    """Write the manifest anew, as somebody could who may write here."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    files = [file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST]
    manifest["files"] = {
        file.relative_to(path).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    manifest["sha256"] = store_module._digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def load(tiny: SimpleNamespace, checkpoints: Any) -> bool:
    """Resume as a run does; whether that went through."""
    path = checkpoints.newest()
    try:
        weights.load(tiny.policy.chunks, weights.HfWeights(path / "hf"))
        checkpoints.restore(tiny.actor, tiny.optimizer, path)
    except Exception:  # whatever it is: nothing may have run
        return False
    return True


@pytest.mark.parametrize("kind", state.FORMATS)
def test_a_hostile_pickle_in_every_slot_is_never_run(tiny, tmp_path, kind):
    save(tiny, tmp_path / "run", 2, "new", async_save=False, optimizer_format=kind)
    checkpoints, mark = tiny.saves.checkpoints_of(tmp_path / "run", tiny.mesh), tmp_path / "mark"
    path, slots = checkpoints.store.path(2), 0
    assert load(tiny, checkpoints)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole = file.read_bytes()
        for data in payloads(mark).values():
            file.write_bytes(data)
            if file.name != MANIFEST:
                sign(path)
                assert verify(path) == []
                load(tiny, checkpoints)
            else:
                assert checkpoints.newest() is None
            assert not mark.exists(), file
            slots += 1
        file.write_bytes(whole)
        sign(path)
    assert load(tiny, checkpoints) and slots >= 3 * 14


@pytest.mark.parametrize("kind", state.FORMATS)
def test_a_hostile_pickle_in_place_of_every_object_among_the_tensors(tiny, tmp_path, kind):
    save(tiny, tmp_path / "run", 2, "new", async_save=False, optimizer_format=kind)
    checkpoints, mark = tiny.saves.checkpoints_of(tmp_path / "run", tiny.mesh), tmp_path / "mark"
    optimizer = checkpoints.store.path(2) / "state/optimizer"
    whole, described = (optimizer / "__0_0.distcp").read_bytes(), (optimizer / ".metadata").read_bytes()
    items = list(read_metadata(optimizer).storage_data)
    chosen = items[:: len(items) // 5] + [item for item in items if item.offset is None]
    for item in chosen:
        for data in payloads(mark).values():
            metadata = read_metadata(optimizer)
            metadata.storage_data[item].offset, metadata.storage_data[item].length = len(whole), len(data)
            (optimizer / "__0_0.distcp").write_bytes(whole + data)
            (optimizer / ".metadata").write_bytes(pickle.dumps(metadata))
            sign(checkpoints.store.path(2))
            assert not load(tiny, checkpoints), item
            assert not mark.exists(), item
            (optimizer / ".metadata").write_bytes(described)
    assert len(chosen) >= 5 + 3 * (kind == "dp_reshardable")  # this one has objects beside its tensors
