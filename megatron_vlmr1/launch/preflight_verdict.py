"""From what all nodes found to which of them are bad, and whether the job as a whole is broken.

What is measured is compared with the median of the nodes, since nobody knows what a cluster should give; that takes
three nodes. Two nodes that differ cannot tell which of them is wrong.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_vlmr1.launch.disk import Disk
from megatron_vlmr1.launch.health import (
    MIN_DISK_BYTES,
    MIN_MEMORY_BYTES,
    SLOW_DISK_BYTES_S,
    gigabytes,
    gpu_reasons,
)
from megatron_vlmr1.launch.preflight_network import WRONG, Pair
from megatron_vlmr1.launch.preflight_node import RankFacts
from megatron_vlmr1.launch.versions import DRIVER
from megatron_vlmr1.telemetry.nvml import Health

CLOCK_TOLERANCE_S = 2.0  # between a node's wall clock and the median of all
SLOW_LINK = 0.4  # times the median of nodes: less is a slow network
SLOW_GPU = 0.75  # the same of matrix products
SLOW_DISK = 0.1  # the same of writing, where it is less than SLOW_DISK_BYTES_S, too
LOW_MEMORY = 0.5  # the same of the share of a node's memory that is available
COMPARED = 3  # nodes that it takes to compare


@dataclass(frozen=True)
class Node:
    """One node as its ranks found it.

    Attributes:
        first: what its first rank found.
        ranks: of the job, on this node.
        gpus: of those ranks.
        gemm_tflops: of those ranks, the slowest.
        clock_ahead_s: of its wall clock before rank 0's.
        sees_run: whether it sees a file that rank 0 has written into the run's directory.
        all_reduce_bytes_s: bus bandwidth within the node; 0 for one rank.
    """

    first: RankFacts
    ranks: tuple[int, ...]
    gpus: tuple[Health, ...]
    gemm_tflops: float
    clock_ahead_s: float
    sees_run: bool
    all_reduce_bytes_s: float

    @property
    def name(self) -> str:
        """As SLURM knows it."""
        return self.first.node


@dataclass
class Verdict:
    """What to do about it.

    Attributes:
        broken: why the job cannot work on any nodes, "" if it can.
        bad: reasons by node.
        warnings: what is worth a line and no more.
    """

    broken: str = ""
    bad: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def blame(self, node: str, reason: str) -> None:
        """Add a reason why a node is bad."""
        self.bad.setdefault(node, []).append(reason)

    def words(self) -> str:
        """Return all bad nodes and why, in one line."""
        return "; ".join(f"{node}: {', '.join(reasons)}" for node, reasons in self.bad.items())


def verdict(nodes: Sequence[Node], pairs: Sequence[Pair]) -> Verdict:
    """Judge the job; `pairs` are those that were measured."""
    out = Verdict(broken=_disagreement(nodes) or _not_shared(nodes) or nodes[0].first.port)
    _judge_versions_of_drivers(nodes, out)
    for node in nodes:
        for gpu in node.gpus:
            for reason in gpu_reasons(gpu):
                out.blame(node.name, f"GPU {gpu.index} {reason}")
        for disk in node.first.disks:
            if reason := _disk_reason(disk):
                out.blame(node.name, reason)
        if node.first.free_bytes < MIN_MEMORY_BYTES:
            out.blame(node.name, f"{gigabytes(node.first.free_bytes)} of memory available")
    _judge_clocks(nodes, out)
    _judge_network(nodes, pairs, out)
    _compare(nodes, out)
    if not out.broken and len(out.bad) == len(nodes):
        out.broken = out.words() if len(nodes) == 1 else f"every node is bad: {out.words()}"
    return out


def any_slow(pairs: Sequence[Pair]) -> bool:
    """Whether a pair is slow beside the others."""
    rates = [pair.bytes_s for pair in pairs]
    return bool(rates) and min(rates) < SLOW_LINK * statistics.median(rates)


def slow_nodes(names: Sequence[str], pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the median bandwidth of each node that is slow in most of its pairs, the others being no slower than
    usual: a slow link between two well nodes makes neither of them slow."""
    if len(names) < COMPARED:
        return {}
    rates = {name: [p.bytes_s for p in pairs if name in p.nodes] for name in names}
    # The higher median: of two pairs one may be with the bad node.
    medians = {name: statistics.median_high(values) for name, values in rates.items() if values}
    if not medians:
        return {}
    usual = statistics.median(medians.values())
    return {name: rate for name, rate in medians.items() if rate < SLOW_LINK * usual}


def _disagreement(nodes: Sequence[Node]) -> str:
    first = nodes[0]
    for node in nodes[1:]:
        for name, version in first.first.versions.items():
            other = node.first.versions.get(name, "")
            if other != version and name != DRIVER:
                return f"{name} is {version or 'missing'} on {first.name} and {other or 'missing'} on {node.name}"
        if node.first.config != first.first.config:
            ours, theirs = first.first.config[:12], node.first.config[:12]
            return f"the config on {node.name} is another one than on {first.name} (sha256 {theirs}, {ours})"
    return ""


def _judge_versions_of_drivers(nodes: Sequence[Node], out: Verdict) -> None:
    drivers = {node.first.versions.get(DRIVER, ""): node.name for node in reversed(nodes)}
    if len(drivers) > 1:
        told = ", ".join(f"{version or 'none'} ({name})" for version, name in drivers.items())
        out.warnings.append(f"nodes have different GPU drivers: {told}")


def _not_shared(nodes: Sequence[Node]) -> str:
    blind = [node.name for node in nodes if not node.sees_run]
    where = nodes[0].first.disks[0].path if nodes[0].first.disks else "the run's directory"
    if not blind:
        return ""
    return (
        f"{where}: what {nodes[0].name} writes there is not seen by {', '.join(blind)}; it must be a shared directory"
    )


def _disk_reason(disk: Disk) -> str:
    if disk.problem:
        return f"{disk.path} cannot be written: {disk.problem}"
    return f"{gigabytes(disk.free_bytes)} free in {disk.path}" if disk.free_bytes < MIN_DISK_BYTES else ""


def _judge_clocks(nodes: Sequence[Node], out: Verdict) -> None:
    ahead = [node.clock_ahead_s for node in nodes]
    usual = statistics.median(ahead) if len(nodes) >= COMPARED else 0.0  # of two, rank 0's counts
    for node in nodes:
        if abs(apart := node.clock_ahead_s - usual) > CLOCK_TOLERANCE_S:
            out.blame(node.name, f"its clock is {abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} the others'")


def _judge_network(nodes: Sequence[Node], pairs: Sequence[Pair], out: Verdict) -> None:
    names = [node.name for node in nodes]
    slow = slow_nodes(names, pairs)
    usual = statistics.median([p.bytes_s for p in pairs if not slow.keys() & set(p.nodes)] or [0.0])
    for name, rate in slow.items():
        said = "its messages arrive changed" if rate == WRONG else f"slow network: {gigabytes(rate)}/s to most nodes"
        out.blame(name, f"{said}, others have {gigabytes(usual)}/s")
    for pair in pairs:
        if slow.keys() & set(pair.nodes):
            continue
        if pair.bytes_s == WRONG:
            out.broken = out.broken or f"messages between {pair.nodes[0]} and {pair.nodes[1]} arrive changed"
        elif pair.bytes_s < SLOW_LINK * usual:
            out.warnings.append(
                f"between {' and '.join(pair.nodes)} only {gigabytes(pair.bytes_s)}/s, usual {gigabytes(usual)}/s"
            )


def _compare(nodes: Sequence[Node], out: Verdict) -> None:
    """Find the nodes that give much less than the median of all."""
    if len(nodes) < COMPARED:
        return
    _below(nodes, lambda n: n.gemm_tflops, SLOW_GPU, "{:.0f} TFLOP/s on its slowest GPU, others {:.0f}", out)
    told = "{:.0%} of its memory available, others {:.0%}"
    _below(nodes, lambda n: n.first.free_bytes / max(1, n.first.total_bytes), LOW_MEMORY, told, out)
    for index, disk in enumerate(nodes[0].first.disks):
        told = "writes {:.1f} MB/s in " + disk.path.replace("{", "{{").replace("}", "}}") + ", others {:.1f}"
        _below(nodes, lambda n, i=index: _write_mb_s(n, i), SLOW_DISK, told, out, SLOW_DISK_BYTES_S / 1e6)  # type: ignore[misc]


def _write_mb_s(node: Node, index: int) -> float:
    return node.first.disks[index].write_bytes_s / 1e6 if index < len(node.first.disks) else 0.0


def _below(
    nodes: Sequence[Node],
    figure: Callable[[Node], float],
    share: float,
    told: str,
    out: Verdict,
    limit: float = float("inf"),
) -> None:
    values: Mapping[str, float] = {node.name: figure(node) for node in nodes}
    usual = statistics.median(values.values())
    for name, value in values.items():
        if 0 < value < min(limit, share * usual):
            out.blame(name, told.format(value, usual))
