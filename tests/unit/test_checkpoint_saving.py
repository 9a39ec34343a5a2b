"""Saving by threads: what lies on disk is of the time of the call, and is published when it is whole."""

from __future__ import annotations

import errno
import json
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint import state
from megatron_vlmr1.checkpoint.background import Writes
from megatron_vlmr1.checkpoint.sharded import Sharded
from megatron_vlmr1.checkpoint.staging import Staging
from megatron_vlmr1.checkpoint.store import read_manifest, verify
from megatron_vlmr1.errors import RunStopped
from tests.checkpoints import write_random_checkpoint
from tests.distributed import ranks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A policy in training in this process alone: mesh, policy, optimizer, actor."""
    weights = write_random_checkpoint(tmp_path_factory.mktemp("saving") / "weights", num_hidden_layers=2)
    with ranks.alone() as mesh, torch.random.fork_rng():
        from tests import saves  # imports megatron-core, which `alone` has prepared

        policy, optimizer = saves.in_training(weights, mesh)
        actor: Any = SimpleNamespace(policy=policy, directory=weights)
        yield SimpleNamespace(mesh=mesh, policy=policy, optimizer=optimizer, actor=actor, saves=saves)


def tensor_files(hashes: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in hashes.items() if name.endswith((".safetensors", ".distcp", ".pt"))}


@pytest.mark.parametrize("kind", state.FORMATS)
def test_every_writer_writes_what_was_there_at_the_call(tiny, tmp_path, monkeypatch, kind):
    args = tiny.policy, tiny.optimizer, tiny.actor.directory, kind
    staging, memory = Staging(), []
    for i in range(2):  # the second in the memory of the first
        at_once = tiny.saves.write_at_once(*args, tmp_path / f"at_once_{i}")
        late = tiny.saves.write_late(*args, tmp_path / f"late_{i}", staging, monkeypatch)
        assert tensor_files(late) == tensor_files(at_once)
        assert {name.split("/")[-1] for name in tensor_files(late)} == {
            *("model.safetensors", "rng_00000.safetensors", "common.pt", "__0_0.distcp")
        }
        numbers = sum(p.numel() for p in tiny.policy.model.parameters())
        assert 16 * numbers <= staging.nbytes < 16.1 * numbers  # weights in fp32, masters, two moments
        memory.append({key: tensor.data_ptr() for key, tensor in staging._held.items()})
    assert memory[0] == memory[1]


@pytest.mark.parametrize("kind", state.FORMATS)
def test_without_the_copies_a_later_state_would_be_written(tiny, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Staging, "copy", lambda self, key, tensor: tensor.detach())
    args = tiny.policy, tiny.optimizer, tiny.actor.directory, kind
    at_once = tensor_files(tiny.saves.write_at_once(*args, tmp_path / "at_once"))
    late = tensor_files(tiny.saves.write_late(*args, tmp_path / "late", Staging(), monkeypatch))
    # What fully_reshardable gathers is megatron-core's own copy already.
    expected = {"state/optimizer/__0_0.distcp"} if kind == "dp_reshardable" else set()
    assert {name for name in late if late[name] != at_once[name]} == expected


def test_writing_asks_no_gpu(tiny, tmp_path, monkeypatch):
    write = Sharded._write

    def beside_a_gpu(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(filesystem, "_OverlappingCpuLoader", None)  # in a thread it would wait on GPU 0
            return write(*args)

    monkeypatch.setattr(Sharded, "_write", beside_a_gpu)
    state.save(tiny.policy, tiny.optimizer, {}, tmp_path)
    assert (tmp_path / "optimizer/__0_0.distcp").is_file()


class Gate:
    """Holds threads that write until it is opened, and can let them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.failing = threading.Event(), False
        run = Writes._run

        def gated(writes: Writes) -> None:
            if writes._later:
                self.opened.wait(30)
            if self.failing:
                writes._waiting.insert(0, self._fail)
            run(writes)

        monkeypatch.setattr(Writes, "_run", gated)

    def _fail(self) -> list[Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_nothing_is_published_or_pruned_before_all_is_written(tiny, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    checkpoints = tiny.saves.checkpoints_of(tmp_path, tiny.mesh, keep_checkpoints=1)
    args = tiny.actor, tiny.optimizer

    def save(step: int, **settings: bool) -> bool:
        return checkpoints.save(*args, tiny.saves.progress(step, checkpoints), {}, **settings)

    assert not checkpoints.under_way
    assert save(1, wait=False) and checkpoints.under_way
    for _ in range(3):
        checkpoints.poll()
        assert checkpoints.under_way and checkpoints.store.steps() == []
    gate.opened.set()
    assert save(2, wait=False)  # waits for the first
    assert checkpoints.store.steps() == [1] and checkpoints.under_way
    assert save(3, last=True, wait=True)
    assert checkpoints.store.steps() == [3] and not checkpoints.under_way
    assert verify(checkpoints.store.path(3)) == []
    kind = read_manifest(checkpoints.store.path(3))["optimizer"]["distrib_optim_sharding_type"]
    assert kind == "fully_reshardable"
    assert checkpoints._staging.nbytes == 0
    loaded = state.load(tiny.policy, tiny.optimizer, checkpoints.store.path(3) / "state")
    assert loaded["step"] == 3


def test_writes_that_fail_in_threads_are_counted_as_failed_saves(tiny, tmp_path, monkeypatch, caplog):
    gate = Gate(monkeypatch)
    gate.opened.set()
    checkpoints = tiny.saves.checkpoints_of(tmp_path, tiny.mesh)
    args = tiny.actor, tiny.optimizer
    outcomes = []
    for step, failing in enumerate([False, True, True, False, True, True, True], start=1):
        gate.failing = failing
        assert checkpoints.save(*args, tiny.saves.progress(step, checkpoints), {})
        checkpoints._flight.save._writes.wait()  # before the next one's fate is set
        outcomes.append(checkpoints.failures)
    with pytest.raises(RunStopped, match="3 checkpoints in a row could not be saved: .*No space left") as stopped:
        checkpoints.poll()
    assert stopped.value.code == 17
    assert outcomes == [0, 0, 1, 2, 0, 1, 2]  # each told of the one before
    assert checkpoints.store.steps() == [1, 4]
    assert not list(checkpoints.store.directory.glob("*.tmp-*"))
    failed = [record.message for record in caplog.records if "failed (" in record.message]
    assert [line.split(":")[0] for line in failed] == [
        *("checkpoint of step 2 failed (1 in a row)", "checkpoint of step 3 failed (2 in a row)"),
        *(f"checkpoint of step {4 + n} failed ({n} in a row)" for n in (1, 2, 3)),
    ]


def test_an_error_of_ours_in_a_thread_is_not_taken_for_a_failing_disk(tmp_path):
    writes = Writes(tmp_path, later=True)
    writes.add(lambda: [].pop())
    writes.start()
    with pytest.raises(IndexError):
        writes.wait()


def test_best_and_milestones_stay_also_after_a_resume(tiny, tmp_path, caplog):
    best = {"metric": "reward/mean", "better": "lower"}
    train = {"keep_checkpoints": 1, "keep_every": 4, "keep_best": best, "async_save": False}
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.5, 6: 1.0, 7: 9.0}
    kept = {}
    for step, value in values.items():
        checkpoints = tiny.saves.checkpoints_of(tmp_path, tiny.mesh, **train)  # remembers nothing
        metrics = {"reward/mean": value, "reward/std": 0.0}
        progress = tiny.saves.progress(step, checkpoints)
        assert checkpoints.save(tiny.actor, tiny.optimizer, progress, metrics)
        kept[step] = checkpoints.store.steps()
    assert kept == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [2, 4, 5], 6: [4, 6], 7: [4, 6, 7]}
    assert "checkpoint of step 4 has no reward/mean: it cannot be the best" in caplog.text
    manifest = json.loads((tmp_path / "checkpoints/step_6/manifest.json").read_text())
    assert manifest["figures"] == {"reward/mean": 1.0}


def test_a_save_that_takes_no_optimizer_apart_names_the_layout(tiny, tmp_path):
    progress = {"config": {"parallel": {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 3}}}
    state.save(tiny.policy, tiny.optimizer, progress, tmp_path, "dp_reshardable")
    says = "dp_reshardable, .* at parallel.tensor_model_parallel_size=3, not 1, parallel.pipeline_model_parallel_size=2"
    with pytest.raises(ValueError, match=says):
        state.load(tiny.policy, tiny.optimizer, tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep_best": {"metric": "reward/mean"}}, "train.keep_best.better: Field required"),
        ({"keep_best": {"metric": "evaluate/test/accuracy", "better": "higher"}}, "no split of that name"),
        ({"keep_best": {"metric": "evaluate/val/accuracy", "better": "higher"}}, "train.evaluate_every=0 steps, which"),
        (
            {
                "keep_best": {"metric": "evaluate/val/accuracy", "better": "higher"},
                **{"evaluate_every": 4, "save_every": 6},
            },
            "must divide train.save_every=6",
        ),
        ({"optimizer_format": "dp_zero"}, "train.optimizer_format: Input should be 'dp_reshardable' or"),
    ],
)
def test_settings_that_do_not_fit(settings, says):
    raw = {"model": {"path": "x"}, "data": {"train": "x", "evaluate": {"val": "x"}}, "train": settings}
    with pytest.raises(ValueError, match=says):
        config.parse(raw, "test")
