"""The preflight of real jobs: `vlmr1 train` that may not start, and `vlmr1 doctor` as a job of two ranks."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlmr1.launch.local import log_path
from tests import jobs
from tests.distributed.ranks import fork


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_broken_job_does_not_start(tmp_path: Path, shards: Path, taken: int) -> None:
    config = jobs.write_config(tmp_path, shards, telemetry={"prometheus_port": taken})
    code, output = jobs.run("train", config, "--nproc", 2)
    said = f"preflight: telemetry.prometheus_port={taken} cannot be had at 127.0.0.1: Address already in use"
    assert code == 2 and [line for line in output.splitlines() if "error" in line] == [f"vlmr1: error: {said}"], output
    attempt = tmp_path / "run/logs/attempt_0"
    assert json.loads((attempt / "outcome.json").read_bytes()) == {"reason": said, "code": 2, "step": None}
    assert json.loads((attempt / "preflight.json").read_bytes())["broken"] in said
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (attempt / "bad_nodes").exists()


def be_node(config: str, seeds: tuple[int, int]) -> None:
    """Examine the job as the only rank of a node."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank}", "VLMR1_LOG": "ERROR"}
    jobs.be_program(["doctor", config, "--json", f"seed={seeds[rank]}"])


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_doctor_as_a_job(tmp_path: Path, shards: Path, seeds: tuple[int, int]) -> None:
    config = jobs.write_config(tmp_path, shards)
    codes = fork(2, be_node, (str(config), seeds), tmp_path)
    said = [log_path(tmp_path, rank).read_text() for rank in range(2)]
    found = json.loads(said[0].splitlines()[-1])
    well = seeds[0] == seeds[1]
    assert codes == [0 if well else 2] * 2 and found["ok"] is well
    assert [node["first"]["node"] for node in found["job"]["nodes"]] == ["n0", "n1"]
    assert [pair["nodes"] for pair in found["job"]["pairs"]] == [["n0", "n1"]] and said[1] == ""
    broken = [line["found"] for line in found["lines"] if line["state"] == "bad"]
    assert broken == [] if well else "the config on n1 is another one than on n0" in broken[0]
    assert not (tmp_path / "run").exists()
