"""A reward service on another node: keys, restarts, and a trainer that uses it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_vlmr1.rewards import keys
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.telemetry.metrics import read_metrics
from tests import jobs
from tests.faults.test_rewards import OWN, TIMEOUT_S, announced, eventually, submit


def served(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start `vlmr1 rewards serve` on a port of this machine, with the keys in a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "megatron_vlmr1.cli", "rewards", "serve", "--bind", address]
    command += ["--keys", str(folder), "--workers", "1", "--functions", str(OWN)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL), address


def test_over_tcp_only_those_with_a_key_are_answered(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    for folder in (ours, others):
        keys.create(folder)
        assert folder.stat().st_mode & 0o77 == 0 and (folder / "client.key_secret").stat().st_mode & 0o77 == 0
    half = Path(shutil.copytree(ours, tmp_path / "half"))  # knows the service, which does not know it
    shutil.copy(others / "client.key_secret", half / "client.key_secret")
    service, address = served(ours)
    try:
        with RewardClient(address, ours) as client:
            assert client.alive(TIMEOUT_S)
            for folder in (None, others, half):
                with RewardClient(address, folder) as stranger:
                    stranger.submit(0, RewardItem("1", ""), {"echo": 1.0})
                    assert not stranger.alive(1.0)
                    assert stranger.collect([0], 0.2)[0].failure
            assert client.stats()["scored"] == 0, "nothing of theirs was taken"
            submit(client, "before", "echo", "3")
            assert client.collect(["before"], TIMEOUT_S)["before"].value == 3.0
            submit(client, "during", "announce", "1.0", str(tmp_path / "mark"))
            eventually(lambda: client.poll() >= 0 and len(announced(tmp_path / "mark")) == 1)
            service.kill()
            service.wait()
            command = [*service.args]  # started again, as SLURM or a person would
            service = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            assert client.collect(["during"], TIMEOUT_S)["during"].value == 1.0
    finally:
        service.terminate()
        assert service.wait(30) == 0


def test_a_damaged_key_is_told_and_not_taken_for_none(tmp_path: Path) -> None:
    keys.create(tmp_path / "keys")
    (tmp_path / "keys/clients/colleague.key").write_text("oops")
    service, _ = served(tmp_path / "keys")
    try:
        assert service.wait(30) == 2
    finally:
        service.kill()


def test_connections_of_strangers_take_no_worker_its_descriptors(tmp_path: Path) -> None:
    keys.create(tmp_path / "keys")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        service, address = served(tmp_path / "keys")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    host, port = address.removeprefix("tcp://").split(":")
    with ExitStack() as held, RewardClient(address, tmp_path / "keys") as client:
        held.callback(service.wait, 30)
        held.callback(service.terminate)
        assert client.alive(TIMEOUT_S)
        for _ in range(200):
            held.enter_context(socket.create_connection((host, int(port)), 10))
        eventually(lambda: len(client.stats()["worker_pids"]) == 1)
        (worker,) = client.stats()["worker_pids"]
        os.kill(worker, signal.SIGKILL)
        submit(client, 0, "echo", "3")
        assert client.collect([0], TIMEOUT_S)[0].value == 3.0 and service.poll() is None


@pytest.mark.timeout(150)
def test_a_trainer_uses_a_service_elsewhere(tmp_path: Path, shards: Path) -> None:
    keys.create(tmp_path / "keys")
    service, address = served(tmp_path / "keys")
    try:
        config = jobs.write_config(
            tmp_path,
            shards,
            parallel={"tensor_model_parallel_size": 1},
            train={"steps": 1},
            rewards={"address": address, "keys": str(tmp_path / "keys")},
        )
        code, output = jobs.run_forked(1, "train", config)
        assert code == 0, output
    finally:
        service.terminate()
        assert service.wait(30) == 0
    facts = json.loads((tmp_path / "run/facts.json").read_text())
    assert facts["reward_pids"][0] == service.pid and facts["scored"] == 16
    assert not (tmp_path / "run/logs/attempt_0/rewards.log").exists()
    ((_, metrics),) = read_metrics(tmp_path / "run")
    assert 0 < metrics["reward/latency_p50_s"] <= metrics["reward/latency_p99_s"] < 10
    assert metrics["reward/queue_depth"] == metrics["reward/failed_frac"] == 0
