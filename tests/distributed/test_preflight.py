"""Four ranks that take themselves for nodes, each fault on one of them: who is named, where, and with which code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1.launch.versions import installed
from tests.distributed import ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.distributed import work_preflight

    directory = tmp_path_factory.mktemp("preflight")
    ranks.run(4, work_preflight.everything, directory)
    return directory


def seen(results: Path, case: str) -> tuple[int | None, str]:
    """The end, which is the same on all ranks."""
    ends = [json.loads((results / f"rank_{rank}.json").read_text())[case] for rank in range(4)]
    assert all(end == ends[0] for end in ends), ends
    return ends[0][0], ends[0][1]


def report(results: Path, case: str) -> dict[str, Any]:
    return json.loads((results / case / "logs/attempt_0/preflight.json").read_text())


def bad_nodes(results: Path, case: str) -> list[str] | None:
    path = results / case / "logs/attempt_0/bad_nodes"
    return path.read_text().splitlines() if path.exists() else None


@pytest.mark.parametrize("case", ["clean", "clean_quick", "pairs_of_ranks", "gpus_well", "slow_link", "driver"])
def test_a_job_that_is_well_goes_on(results: Path, case: str) -> None:
    assert seen(results, case) == (None, "")
    assert bad_nodes(results, case) is None
    found = report(results, case)
    assert found["bad_nodes"] == {} and found["broken"] == ""
    assert not list((results / case).rglob(".vlmr1_*"))  # what it wrote to try the disks is gone


def test_full_measures_every_pair_and_quick_a_few(results: Path) -> None:
    names = [f"n{rank}" for rank in range(4)]
    every = sorted([a, b] for i, a in enumerate(names) for b in names[i + 1 :])
    found = report(results, "clean")
    assert [node["first"]["node"] for node in found["nodes"]] == names
    assert sorted(pair["nodes"] for pair in found["pairs"]) == every
    assert all(pair["bytes_s"] > 1e6 and 0 < pair["latency_s"] < 1 for pair in found["pairs"])
    assert all(node["all_reduce_bytes_s"] == 0 for node in found["nodes"])  # one rank each
    assert all(disk["write_bytes_s"] > 0 for node in found["nodes"] for disk in node["first"]["disks"])
    assert all(abs(node["clock_ahead_s"]) < 1 for node in found["nodes"])
    assert len(report(results, "clean_quick")["pairs"]) == 4  # each node meets two


def test_ranks_of_a_node_measure_together(results: Path) -> None:
    found = report(results, "pairs_of_ranks")
    assert [node["ranks"] for node in found["nodes"]] == [[0, 1], [2, 3]]
    assert all(node["all_reduce_bytes_s"] > 1e6 for node in found["nodes"])
    assert [pair["nodes"] for pair in found["pairs"]] == [["n0", "n1"]]


def test_off_looks_at_nothing(results: Path) -> None:
    assert seen(results, "off") == (None, "")
    assert list((results / "off/logs/attempt_0").iterdir()) == []


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("version", f"preflight: torch is {installed('torch')} on n0 and 9.9 on n2"),
        ("other_config", "preflight: the config on n1 is another one than on n0"),
        ("not_shared", "is not seen by n3; it must be a shared directory"),
        ("disk_everywhere", "preflight: every node is bad: n0: 0.01 GB free in "),
    ],
)
def test_a_broken_job_is_wrong_input(results: Path, case: str, says: str) -> None:
    code, words = seen(results, case)
    assert code == 2 and says in words and "\n" not in words


@pytest.mark.parametrize(
    ("case", "node", "says"),
    [
        ("slow_node", "n2", "slow network: "),
        ("slow_node_quick", "n2", "slow network: "),
        ("changed", "n3", "its messages arrive changed"),
        ("disk", "n1", "0.01 GB free in "),
        ("clock", "n3", "its clock is 60.0 s ahead of the others'"),
        ("clock_of_rank_0", "n0", "its clock is 60.0 s ahead of the others'"),
        ("gpu_ecc", "n1", "GPU 1 has 3 uncorrected memory errors"),
        ("gpu_full", "n1", "GPU 1 has 10.74 GB of 85.90 GB free"),
        ("gpu_slow", "n2", "300 TFLOP/s on its slowest GPU, others 700"),
    ],
)
def test_a_bad_node_is_named_and_the_job_requeued_without_it(results: Path, case: str, node: str, says: str) -> None:
    code, words = seen(results, case)
    assert code == 85, words
    assert words.startswith(f"preflight: bad node {node}: ") and says in words
    assert bad_nodes(results, case) == [node]
    assert list(report(results, case)["bad_nodes"]) == [node]


def test_a_node_that_has_lost_cuda_is_named_before_anybody_waits_for_it(results: Path) -> None:
    code, words = seen(results, "cuda_lost")
    assert code == 2 and words.startswith("no CUDA on n1, while other nodes have it: ")


def test_without_slurm_a_bad_node_is_wrong_input(results: Path) -> None:
    code, words = seen(results, "disk_without_slurm")
    assert code == 2 and "bad node n1: " in words and "start without it, or with launch.preflight=off" in words
    assert bad_nodes(results, "disk_without_slurm") == ["n1"]


def test_what_is_worth_a_line_only(results: Path) -> None:
    told = report(results, "slow_link")["warnings"]
    assert any(line.startswith("between n0 and n1 only ") for line in told)
    (line,) = report(results, "driver")["warnings"]
    assert line == "nodes have different GPU drivers: none (n0), 9.9 (n2)"
