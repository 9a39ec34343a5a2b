"""Publishing and finding checkpoints, with a disk that fails and a process that dies at every point."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from megatron_vlmr1.checkpoint import store as module
from megatron_vlmr1.checkpoint.store import MANIFEST, Keep, Store, read_manifest, verify

FACTS = {"layout": {"tensor_model_parallel_size": 2}, "config_digest": "ab12"}
CALLS = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir")  # the os functions that change or keep the disk


def fill(directory: Path, text: str) -> None:
    (directory / "hf").mkdir()
    (directory / "state" / "rank").mkdir(parents=True)
    (directory / "hf" / "model.safetensors").write_bytes(text.encode() * 100_000)
    (directory / "hf" / "empty.json").write_bytes(b"")
    (directory / "state" / "rank" / "rng.bin").write_bytes(text.encode())


def save(store: Store, step: int, text: str = "") -> Path:
    temporary = store.begin(step)
    fill(temporary, text or f"step {step}")
    return store.publish(step, temporary, FACTS)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_published_checkpoint_and_its_manifest(tmp_path):
    store = Store(tmp_path / "checkpoints", Keep(2))
    temporary = store.begin(3)
    assert temporary.name.startswith("step_3.tmp-")
    fill(temporary, "three")
    path = store.publish(3, temporary, FACTS)
    assert path == tmp_path / "checkpoints" / "step_3"
    assert names(store.directory) == ["latest", "step_3"]
    assert os.readlink(store.directory / "latest") == "step_3"
    manifest = json.loads((path / MANIFEST).read_text())
    assert {key: manifest[key] for key in ("step", *FACTS)} == {"step": 3, **FACTS}
    assert manifest["files"] == {
        "hf/empty.json": {"size": 0, "sha256": hashlib.sha256().hexdigest()},
        "hf/model.safetensors": {"size": 500_000, "sha256": hashlib.sha256(b"three" * 100_000).hexdigest()},
        "state/rank/rng.bin": {"size": 5, "sha256": hashlib.sha256(b"three").hexdigest()},
    }
    assert verify(path) == verify(store.directory / "latest") == []
    assert store.newest_valid() == (3, path)


def test_every_file_and_directory_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(handle: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).split(".tmp")[0])
        fsync(handle)

    def seen_rename(source: os.PathLike, target: os.PathLike) -> None:
        events.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    save(Store(tmp_path, Keep(1)), 1)
    before, after = events[: events.index("-> step_1")], events[events.index("-> step_1") + 1 :]
    assert set(before) == {"model.safetensors", "empty.json", "rng.bin", "hf", "rank", "state", "step_1", MANIFEST}
    assert before.index(MANIFEST) > before.index("hf") > before.index("model.safetensors")
    assert before[-1] == "step_1"  # the directory again, with the manifest in it
    assert after == [tmp_path.name]


@pytest.mark.parametrize(("keep", "left"), [(1, [9]), (2, [7, 9]), (3, [5, 7, 9]), (9, [1, 3, 5, 7, 9])])
def test_prune_keeps_the_newest(tmp_path, keep, left):
    store = Store(tmp_path, Keep(keep))
    for step in (1, 3, 5, 7, 9):
        save(store, step)
    assert store.steps() == left
    assert os.readlink(tmp_path / "latest") == "step_9"


def test_nothing_is_pruned_before_the_new_one_is_published(tmp_path, monkeypatch):
    store = Store(tmp_path, Keep(1))
    save(store, 1)
    temporary = store.begin(2)
    fill(temporary, "two")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.publish(2, temporary, FACTS)
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "step_1"]
    assert store.newest_valid() == (1, tmp_path / "step_1")


def test_steps_above_a_given_up_course_do_not_crowd_out_the_new_one(tmp_path):
    store = Store(tmp_path, Keep(2))
    for step in (4, 8):
        save(store, step)
    (tmp_path / "step_8" / "hf" / "model.safetensors").write_bytes(b"broken")
    said: list[str] = []
    assert store.newest_valid(said.append) == (4, tmp_path / "step_4")
    save(store, 6)
    assert store.newest_valid(said.append) == (6, tmp_path / "step_6")
    assert os.readlink(tmp_path / "latest") == "step_6"
    save(store, 8, "eight again")  # replaces the broken one
    assert verify(tmp_path / "step_8") == []
    assert store.steps() == [6, 8]
    assert (tmp_path / "step_8" / "state" / "rank" / "rng.bin").read_text() == "eight again"


def spoil_flip(path: Path) -> str:
    file = path / "hf" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "hf/model.safetensors has changed: its sha256 differs"


def spoil_cut(path: Path) -> str:
    os.truncate(path / "state" / "rank" / "rng.bin", 2)
    return "state/rank/rng.bin has 2 bytes instead of 6"


def spoil_remove(path: Path) -> str:
    (path / "state" / "rank" / "rng.bin").unlink()
    return "state/rank/rng.bin is missing"


def spoil_add(path: Path) -> str:
    (path / "state" / ".metadata").write_bytes(b"a pickle")
    return "state/.metadata is not in the manifest"


def spoil_add_folder_link(path: Path) -> str:
    (path / "more").symlink_to("/tmp")
    return "more is not in the manifest"


def spoil_link(path: Path) -> str:
    outside = path.parent / "outside"
    (path / "hf" / "empty.json").rename(outside)
    (path / "hf" / "empty.json").symlink_to(outside)
    return "hf/empty.json is not a file of this directory"


def spoil_pipe(path: Path) -> str:
    (path / "hf" / "empty.json").unlink()
    os.mkfifo(path / "hf" / "empty.json")
    return "hf/empty.json is not a file of this directory"


def spoil_manifest_missing(path: Path) -> str:
    (path / MANIFEST).unlink()
    return f"{path / MANIFEST}: no manifest; not a published checkpoint"


def spoil_manifest_bit(path: Path) -> str:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"config_digest": "ab12"', '"config_digest": "ab13"'))
    return f"{path / MANIFEST}: not a usable manifest: its content does not match its own checksum"


def spoil_manifest_cut(path: Path) -> str:
    os.truncate(path / MANIFEST, 100)
    return f"{path / MANIFEST}: not a usable manifest: "


def spoil_manifest_deep(path: Path) -> str:
    (path / MANIFEST).write_text("[" * 200_000)
    return f"{path / MANIFEST}: not a usable manifest: "


def spoil_manifest_escape(path: Path) -> str:
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"]["../../passwd"] = {"size": 0, "sha256": ""}
    (path.parent.parent / "passwd").write_bytes(b"")
    manifest["sha256"] = module._digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    return "../../passwd is not a file of this directory"


def spoil_manifest_shape(path: Path) -> str:
    manifest = {"format": 1, "step": 2, "files": {"hf/empty.json": [0]}}
    (path / MANIFEST).write_text(json.dumps({**manifest, "sha256": module._digest(manifest)}))
    return f"{path / MANIFEST}: not a usable manifest: step or files is not as it should be"


def spoil_name(path: Path) -> str:
    (path.parent / "step_1" / MANIFEST).replace(path / MANIFEST)
    return f"{path / MANIFEST}: it belongs to step 1"


SPOILERS = [value for name, value in sorted(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_damage_is_named_and_the_previous_checkpoint_taken(tmp_path, spoil):
    store = Store(tmp_path / "run", Keep(3))
    for step in (0, 1, 2):
        save(store, step)
    problem = spoil(store.path(2))
    found = verify(store.path(2))
    assert len(found) == 1
    assert found[0].startswith(problem)
    assert "\n" not in found[0]
    said: list[str] = []
    expected = 0 if spoil is spoil_name else 1
    assert store.newest_valid(said.append) == (expected, store.path(expected))
    assert said[0] == f"{store.path(2)} is not valid and is passed over: {found[0]}"


def test_no_checkpoint_or_none_that_is_valid(tmp_path):
    store = Store(tmp_path / "run", Keep(1))
    assert store.newest_valid() is None
    assert store.clean() == []
    save(store, 1)
    spoil_flip(store.path(1))
    said: list[str] = []
    assert store.newest_valid(said.append) is None
    assert len(said) == 1


def test_clean_removes_leftovers_and_nothing_else(tmp_path):
    store = Store(tmp_path, Keep(2))
    save(store, 1)
    fill(store.begin(2), "half")
    (tmp_path / "latest.tmp-0a1b").symlink_to("step_2")
    for name in ("step_x", "notes.tmp-1", "step_3.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name.split("-")[0] for path in store.clean()] == ["latest.tmp", "step_2.tmp"]
    assert names(tmp_path) == ["latest", "notes.tmp-1", "step_1", "step_3.tmp", "step_x"]
    assert store.steps() == [1]


def test_read_manifest_gives_the_facts(tmp_path):
    path = save(Store(tmp_path, Keep(1)), 5)
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["layout"], manifest["config_digest"]) == (5, FACTS["layout"], "ab12")
    with pytest.raises(ValueError, match="no manifest; not a published checkpoint"):
        read_manifest(tmp_path)


class FailingDisk:
    """Lets the first `good` of the watched calls through and then does `fail` at the next."""

    def __init__(self, good: int, fail) -> None:
        self.left = good
        self.fail = fail

    def install(self, patch) -> None:
        for name in CALLS:
            patch(os, name, self._watch(getattr(os, name)))

    def _watch(self, real):
        def call(*args, **settings):
            self.left -= 1
            if self.left == -1:
                self.fail()
            return real(*args, **settings)

        return call


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_a_disk_error_at_any_call_publishes_nothing_or_all(tmp_path, monkeypatch, again):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    failures = 0
    for good in range(200):
        store = Store(tmp_path / str(good), Keep(2))
        save(store, 1, "one")
        save(store, 2, "two")
        step = 2 if again else 3
        temporary = store.begin(step)
        fill(temporary, "new")
        disk = FailingDisk(good, full)
        with monkeypatch.context() as patch:
            disk.install(patch.setattr)
            try:
                store.publish(step, temporary, FACTS)
                failed = False
            except OSError:
                failed = True
        failures += failed
        assert not list(store.directory.glob("*.tmp-*")) or not failed
        expected = (2, "two") if failed else (step, "new")
        newest = store.newest_valid()
        assert newest == (expected[0], store.path(expected[0]))
        assert (newest[1] / "state" / "rank" / "rng.bin").read_text() == expected[1]
        assert os.readlink(store.directory / "latest") == f"step_{expected[0]}"
        if disk.left >= 0:  # the disk never failed: all calls have been tried
            break
    assert failures >= 12
    assert good < 199


def publish_and_die(store: Store, step: int, good: int) -> int:
    """Publish in a child process that dies at call number `good`; its exit code: 9, or 0 when it lived."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        temporary = store.begin(step)
        fill(temporary, "new")
        disk = FailingDisk(good, lambda: os._exit(9))
        disk.install(setattr)
        store.publish(step, temporary, FACTS)
        os._exit(0)
    finally:
        os._exit(3)


@pytest.mark.parametrize("step", [1, 2], ids=["a step that is there", "a new step"])
def test_death_at_any_call_leaves_the_old_or_the_new(tmp_path, step):
    deaths = 0
    for good in range(200):
        store = Store(tmp_path / str(good), Keep(1))
        save(store, 1, "old")
        status = publish_and_die(store, step, good)
        assert status in (0, 9)
        deaths += status == 9
        store.clean()
        newest = store.newest_valid()
        assert newest is not None
        text = (newest[1] / "state" / "rank" / "rng.bin").read_text()
        assert (newest[0], text) in [(1, "old"), (step, "new")]
        assert not [name for name in names(store.directory) if "-" in name]
        save(store, 3)  # life goes on
        assert store.newest_valid() == (3, store.path(3))
        if status == 0:
            break
    assert deaths >= 12


def test_shares_of_a_verification_make_a_whole_one(tmp_path):
    path = save(Store(tmp_path, Keep(3)), 1)
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in (MANIFEST, "empty.json")]
    assert len(files) >= 2
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        [problem] = verify(path)
        assert sorted(p for i in range(3) for p in verify(path, (i, 3))) == [problem]
        file.write_bytes(whole)
    (path / "stranger").touch()
    assert module.summary(verify(path, (2, 3))) == "stranger is not in the manifest"
    assert module.summary(["a", "b", "c"]) == "a and 2 more problems" and module.summary([]) == ""
