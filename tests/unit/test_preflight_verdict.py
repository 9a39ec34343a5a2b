"""Who is blamed, over many nodes; rounds of pairs; the count of attempts that found bad nodes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_vlmr1.config import TelemetryConfig
from megatron_vlmr1.errors import REQUEUE, RunStopped
from megatron_vlmr1.launch import preflight, preflight_node
from megatron_vlmr1.launch.disk import Disk, existing_parent, measure
from megatron_vlmr1.launch.health import port_problem
from megatron_vlmr1.launch.preflight_network import WRONG, Pair, quick_rounds, tournament
from megatron_vlmr1.launch.preflight_node import RankFacts
from megatron_vlmr1.launch.preflight_verdict import Node, Verdict, slow_nodes, verdict
from megatron_vlmr1.launch.versions import code_sha256, versions
from megatron_vlmr1.runtime import distributed
from megatron_vlmr1.telemetry.nvml import Health

GB = 10**9


def node(name: str, rank: int = 0) -> Node:
    disks = (Disk("/run", 10**12, 1e9), Disk("/tmp", 10**12, 1e9))
    well = Health(0, mem_free=80 * GB, mem_total=80 * GB)
    first = RankFacts(rank, name, "c0ffee", {"torch": "2.13"}, disks, well, 700.0, 500 * GB, 512 * GB)
    return Node(first, (rank,), (well,), 700.0, 0.0, True, 0.0)


def job(count: int) -> list[Node]:
    return [node(f"n{i}", i) for i in range(count)]


def network(nodes: list[Node], slow: dict[str, float]) -> list[Pair]:
    """All pairs at 20 GB/s, and those with a node of `slow` at its rate."""
    names = [n.name for n in nodes]
    rounds = [(names[a], names[b]) for pairs in tournament(len(names)) for a, b in pairs]
    return [Pair(pair, min(slow.get(name, 20.0) for name in pair) * GB, 1e-5) for pair in rounds]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 128])
def test_a_tournament_lets_each_two_meet_once_in_disjoint_rounds(count: int) -> None:
    rounds = tournament(count)
    assert len(rounds) == count - 1 + count % 2
    for pairs in rounds:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players)) and len(pairs) == count // 2
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert tournament(1) == [[]]


@pytest.mark.parametrize("count", [3, 4, 5, 128])
def test_the_slow_node_is_named_not_its_partners(count: int) -> None:
    nodes = job(count)
    found = verdict(nodes, network(nodes, {"n1": 2.0}))
    assert found.bad == {"n1": ["slow network: 2.00 GB/s to most nodes, others have 20.00 GB/s"]}
    assert (found.broken, found.warnings) == ("", [])
    few = [pair for pairs in tournament(count)[: quick_rounds(count)] for pair in pairs]
    assert min(sum(i in pair for pair in few) for i in range(count)) == 2
    quick = [Pair((f"n{a}", f"n{b}"), (2.0 if 1 in (a, b) else 20.0) * GB, 1e-5) for a, b in few]
    assert list(slow_nodes([n.name for n in nodes], quick)) == ["n1"]


def test_several_slow_nodes_and_messages_that_arrive_changed() -> None:
    nodes = job(16)
    found = verdict(nodes, network(nodes, {"n3": 1.0, "n9": 4.0, "n5": WRONG / GB}))
    assert set(found.bad) == {"n3", "n9", "n5"} and "arrive changed" in found.bad["n5"][0]
    two = job(2)
    assert verdict(two, network(two, {"n0": WRONG / GB})).broken == "messages between n0 and n1 arrive changed"
    assert verdict(two, network(two, {"n0": 1e-3})) == Verdict()  # of two, nobody is the measure


@pytest.mark.parametrize(
    ("sick", "says"),
    [
        (Health(3, lost="GPU is lost"), "GPU 3 does not answer: GPU is lost"),
        (Health(3, throttled=("power brake",)), "GPU 3 is slowed down (power brake)"),
        (Health(3, row_trouble="rows wait"), "GPU 3 rows wait"),
        (
            Health(3, mem_free=8 * GB, mem_total=80 * GB, processes=(7, 8)),
            "GPU 3 has 8.00 GB of 80.00 GB free (processes 7, 8)",
        ),
    ],
)
def test_a_sick_gpu(sick: Health, says: str) -> None:
    nodes = job(3)
    nodes[1] = replace(nodes[1], gpus=(sick,))
    assert verdict(nodes, []).bad == {"n1": [says]}


def test_what_is_compared_with_the_other_nodes() -> None:
    nodes = job(5)
    nodes[1] = replace(nodes[1], gemm_tflops=500.0)
    nodes[0] = replace(nodes[0], first=replace(nodes[0].first, free_bytes=124 * GB, total_bytes=128 * GB))
    nodes[2] = replace(nodes[2], first=replace(nodes[2].first, free_bytes=100 * GB, total_bytes=500 * GB))
    slow = (Disk("/run", 10**12, 1e6), Disk("/tmp", 10**12, 5e7))
    nodes[3] = replace(nodes[3], first=replace(nodes[3].first, disks=slow))
    nodes[4] = replace(nodes[4], clock_ahead_s=-5.0)
    assert verdict(nodes, []).bad == {
        "n1": ["500 TFLOP/s on its slowest GPU, others 700"],
        "n2": ["20% of its memory available, others 98%"],
        "n3": ["writes 1.0 MB/s in /run, others 1000.0"],  # 50 MB/s are slow beside others, and enough
        "n4": ["its clock is 5.0 s behind the others'"],
    }


def test_a_disk_that_cannot_be_written_and_a_port_that_is_taken() -> None:
    nodes = job(2)
    nodes[1] = replace(nodes[1], first=replace(nodes[1].first, disks=(Disk("/run", problem="Read-only file system"),)))
    assert verdict(nodes, []).bad == {"n1": ["/run cannot be written: Read-only file system"]}
    nodes[0] = replace(nodes[0], first=replace(nodes[0].first, port="telemetry.prometheus_port=80 cannot be had"))
    assert verdict(nodes, []).broken == "telemetry.prometheus_port=80 cannot be had"
    assert verdict(nodes[1:], []).broken == "n1: /run cannot be written: Read-only file system"  # it is the only one


def test_requeues_end_after_three_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(distributed, "is_first", lambda: True)
    monkeypatch.setattr(distributed, "broadcast_text", lambda text: text)
    bad = Verdict(bad={"n1": ["sick"]})
    ends = []
    for number, found in enumerate([True, True, False, True, True, True]):
        log_dir = tmp_path / f"attempt_{number}"
        log_dir.mkdir()
        if found:
            (log_dir / preflight.BAD_NODES).write_text("n1\n")
            with pytest.raises((RunStopped, ValueError)) as end:
                preflight._leave_out(bad, log_dir)
            ends.append(getattr(end.value, "code", str(end.value)))
    assert ends[:-1] == [REQUEUE] * 4
    assert ends[-1] == "preflight: bad node n1: sick; 3 attempts in a row found bad nodes, so it is not requeued"


def test_disks_and_ports(tmp_path: Path) -> None:
    found = measure(tmp_path, 1 << 20)
    assert found.free_bytes > 0 and found.write_bytes_s > 0 and not found.problem and not list(tmp_path.iterdir())
    assert measure(tmp_path / "absent", 1).problem == "No such file or directory"
    assert existing_parent(tmp_path / "a/b/c") == tmp_path
    assert port_problem("127.0.0.1", 0) == "" and port_problem("127.0.0.1", None) == ""
    assert port_problem("192.0.2.1", 9400).startswith("telemetry.prometheus_port=9400 cannot be had at 192.0.2.1: ")


def test_a_disk_that_is_slow_once_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def best(*found: Disk) -> Disk:
        left = iter(found)
        monkeypatch.setattr(preflight_node, "measure", lambda place, size: next(left))
        best = preflight_node._measured(Path("/run"), 1)
        assert next(left, None) is None  # it measured as often
        return best

    monkeypatch.setattr(preflight_node, "_PAUSE_S", 0.0)
    slow, slower, fast = Disk("/run", 9, 2e6), Disk("/run", 9, 1e6), Disk("/run", 9, 5e8)
    gone = Disk("/run", problem="Input/output error")
    assert best(fast) == fast == best(slow, fast)
    assert best(slower, slow, slower) == slow
    assert best(gone) == gone == best(slow, gone)


def test_a_port_that_is_taken_ends_no_run_that_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_node, "port_problem", lambda host, port: f"{port} is taken")
    telemetry = TelemetryConfig(prometheus_port=9400)
    ports = []
    for number in (0, 1):
        (tmp_path / f"attempt_{number}").mkdir()
        ports += [preflight_node.facts(0, "", tmp_path / f"attempt_{number}", None, "quick", telemetry).port]
    assert ports == ["9400 is taken", ""]


def test_a_gpu_is_as_fast_as_most_of_its_rounds_and_may_have_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.1, 0.1, 0.9, 1.0, 1.1])  # the second round of three is held up
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(preflight_node, "device", SimpleNamespace(has_cuda=lambda: True, device=lambda: "cpu"))
    monkeypatch.setattr(preflight_node, "_GEMM", 10)
    monkeypatch.setattr(preflight_node, "_GEMM_S", 0.95)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    assert preflight_node.gemm_tflops() == pytest.approx(4 * 2 * 10**3 / 0.1 / 1e12)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", full)
    assert preflight_node.gemm_tflops() == 0.0


def test_a_message_that_arrived_changed_once_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*rates: float) -> float:
        left = iter(rates)
        monkeypatch.setattr(
            preflight, "between_nodes", lambda *_: [Pair(("a", "b"), 20.0, 0.0), Pair(("b", "c"), next(left), 0.0)]
        )
        return preflight._measured_pairs(["a", "b", "c"], [[0], [1], [2]], False)[1].bytes_s

    monkeypatch.setattr(preflight, "_PAUSE_S", 0.0)
    assert measured(2.0, 3.0, 19.0) == 19.0
    assert measured(2.0, 3.0, 1.0, 2.0) == 3.0
    assert measured(WRONG, 20.0, 20.0, 20.0) == WRONG == measured(2.0, WRONG, 20.0, 20.0)


def test_versions_name_the_code() -> None:
    found = versions()
    assert found["code of megatron_vlmr1"] == code_sha256()[:12] and len(found["torch"]) > 3
