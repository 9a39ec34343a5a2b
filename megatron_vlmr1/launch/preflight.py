"""Before the first step: are all nodes of the job well, alike, and fast?

All ranks call `preflight`. A bad node is named, in ``logs/attempt_K/bad_nodes`` too, for the batch script to leave it
out when the job is requeued; a job that no choice of nodes would mend ends as wrong input does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vlmr1 import config
from megatron_vlmr1.config import Config
from megatron_vlmr1.errors import REQUEUE, RunStopped
from megatron_vlmr1.launch.preflight_network import WRONG, Pair, between_nodes, in_nodes
from megatron_vlmr1.launch.preflight_node import RankFacts, facts
from megatron_vlmr1.launch.preflight_verdict import Node, Verdict, any_slow, verdict
from megatron_vlmr1.runtime import attempts, clocks, distributed
from megatron_vlmr1.runtime.ranks import leads_node
from megatron_vlmr1.telemetry.files import json_line, write_or_warn

logger = logging.getLogger(__name__)

BAD_NODES = "bad_nodes"  # a file of an attempt: names of SLURM nodes, one a line
REPORT = "preflight.json"
MAX_IN_A_ROW = 3  # attempts that found bad nodes: then it is the cluster, or the thresholds
_AGAIN, _PAUSE_S = 3, 0.3  # measurements after the first, and between them
_SEEN_S = 5.0  # for a file to be seen on all nodes, through a network file system's caches


@dataclass(frozen=True)
class Examination:
    """What rank 0 knows in the end; on other ranks only the verdict is meant."""

    level: str
    seconds: float
    nodes: tuple[Node, ...]
    pairs: tuple[Pair, ...]
    verdict: Verdict

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        row = asdict(self)
        judged = row.pop("verdict")
        return row | {"bad_nodes": judged["bad"], "broken": judged["broken"], "warnings": judged["warnings"]}

    def summary(self) -> str:
        """Return the measurements as one line."""
        ranks = sum(len(node.ranks) for node in self.nodes)
        said = [f"preflight ({self.level}): {_count(len(self.nodes), 'node')}, {_count(ranks, 'rank')}"]
        inside = [node.all_reduce_bytes_s for node in self.nodes if node.all_reduce_bytes_s]
        if inside:
            said.append(f"all-reduce in a node {min(inside) / 1e9:.2f} GB/s")
        if self.pairs:
            slowest = min(self.pairs, key=lambda pair: pair.bytes_s)
            latency = max(pair.latency_s for pair in self.pairs)
            between = f"{' and '.join(slowest.nodes)} {slowest.bytes_s / 1e9:.2f} GB/s"
            said.append(f"slowest of {_count(len(self.pairs), 'pair')} {between}, latency up to {latency * 1e6:.0f} us")
        written = [disk.write_bytes_s for node in self.nodes for disk in node.first.disks if disk.write_bytes_s]
        if written:
            said.append(f"disks from {min(written) / 1e6:.0f} MB/s")
        return f"{'; '.join(said)}; took {self.seconds:.1f} s"


def preflight(cfg: Config, log_dir: Path) -> None:
    """Examine the job as `launch.preflight` says, and end it where it had better not start; all ranks call it.

    Raises:
        ValueError: the job is broken, or a bad node cannot be left out; one line, the same on all ranks.
        RunStopped: there are bad nodes, and SLURM shall start the job again without them (85).
    """
    if cfg.launch.preflight == "off":
        return
    found = examine(cfg.launch.preflight, log_dir, cfg)
    judged = found.verdict
    if distributed.is_first():
        write_or_warn(log_dir / REPORT, json_line(found.document()))
        logger.info("%s", found.summary())
        for line in judged.warnings:
            logger.warning("preflight: %s", line)
        if judged.bad:
            write_or_warn(log_dir / BAD_NODES, "".join(f"{node}\n" for node in judged.bad).encode())
    if judged.broken:
        by_nodes = judged.bad and judged.words() in judged.broken
        raise ValueError(f"preflight: {judged.broken}{'; or start with launch.preflight=off' if by_nodes else ''}")
    if judged.bad:
        _leave_out(judged, log_dir)


def examine(level: str, directory: Path, cfg: Config | None) -> Examination:
    """Let all ranks look at themselves and at each other; all ranks call it.

    Args:
        level: quick or full.
        directory: of rank 0, which all nodes should share; exists there.
        cfg: which must be the same on all nodes, if there is one.
    """
    begun = time.monotonic()
    rank, _ = distributed.place()
    cache_dir = cfg.data.cache_dir if cfg else None
    telemetry = cfg.telemetry if cfg else None
    mine = facts(rank, config_sha256(cfg) if cfg else "", directory, cache_dir, level, telemetry)
    sees = _sees_run(directory)
    ahead_s = clocks.ahead_s()
    names, groups = _nodes(mine.node)
    inside = in_nodes(groups)
    pairs = _measured_pairs(names, groups, every=level == "full")
    ranks: Sequence[tuple[RankFacts, bool]] = distributed.gathered((mine, sees))
    nodes = tuple(_node(group, ranks, ahead_s, rate) for group, rate in zip(groups, inside, strict=True) if ranks)
    judged = _shared(verdict(nodes, pairs) if ranks else Verdict())
    return Examination(level, round(time.monotonic() - begun, 3), nodes, tuple(pairs), judged)


def _measured_pairs(names: Sequence[str], groups: Sequence[Sequence[int]], every: bool) -> list[Pair]:
    """Measure again while a pair is slow, and keep the best: what is slow every time is slow, the rest is weather."""
    pairs = between_nodes(names, groups, every)
    for _ in range(_AGAIN):
        if not any_slow(pairs):  # the same on all ranks
            break
        time.sleep(_PAUSE_S)
        again = between_nodes(names, groups, every)
        pairs = [_better(*pair) for pair in zip(pairs, again, strict=True)]
    return pairs


def _better(first: Pair, again: Pair) -> Pair:
    """The faster; what arrived changed once is no weather."""
    return next((pair for pair in (first, again) if pair.bytes_s == WRONG), max(first, again, key=lambda p: p.bytes_s))


def config_sha256(cfg: Config) -> str:
    """Return the sha256 of the resolved config."""
    return hashlib.sha256(config.dump(cfg).encode()).hexdigest()


def _shared(judged: Verdict) -> Verdict:
    return Verdict(**json.loads(distributed.broadcast_text(json.dumps(asdict(judged)))))


def _nodes(name: str) -> tuple[list[str], list[list[int]]]:
    """Return the nodes' names and the ranks of each, in the order of their first ranks."""
    names: list[str] = json.loads(distributed.broadcast_text(json.dumps(distributed.gathered(name))))
    groups: dict[str, list[int]] = {}
    for rank, node in enumerate(names):
        groups.setdefault(node, []).append(rank)
    return list(groups), list(groups.values())


def _node(group: Sequence[int], ranks: Sequence[tuple[RankFacts, bool]], ahead_s: Sequence[float], rate: float) -> Node:
    members = [ranks[rank][0] for rank in group]
    return Node(
        first=next((member for member in members if member.versions), members[0]),
        ranks=tuple(group),
        gpus=tuple(member.gpu for member in members if member.gpu),
        gemm_tflops=min(member.gemm_tflops for member in members),
        clock_ahead_s=ahead_s[group[0]],
        sees_run=all(ranks[rank][1] for rank in group),
        all_reduce_bytes_s=rate,
    )


def _sees_run(directory: Path) -> bool:
    """Whether this node sees a file that rank 0 writes; a directory that cannot be written says so as a disk."""
    name = distributed.broadcast_text(f".vlmr1_{secrets.token_hex(8)}")
    path = directory / name
    written = False
    if distributed.is_first():
        written = write_or_warn(path, b"")
    if not distributed.any_rank(written):
        return True
    seen = not leads_node() or _appears(path)
    distributed.any_rank(seen)  # all have looked
    if written:
        with suppress(OSError):
            path.unlink()
    return seen


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SEEN_S
    while not os.path.exists(path):  # Path's own raises what a network file system may answer
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _leave_out(judged: Verdict, log_dir: Path) -> None:
    """Let SLURM start the job again without the bad nodes, where that can help.

    Raises:
        RunStopped: it can.
        ValueError: it cannot.
    """
    many = "s" if len(judged.bad) > 1 else ""
    said = f"preflight: bad node{many} {judged.words()}"
    if not _is_slurm_job(os.environ):
        raise ValueError(f"{said}; start without {'them' if many else 'it'}, or with launch.preflight=off")
    told = distributed.broadcast_text(str(_in_a_row(log_dir)) if distributed.is_first() else "")
    if int(told) >= MAX_IN_A_ROW:
        raise ValueError(f"{said}; {told} attempts in a row found bad nodes, so it is not requeued")
    raise RunStopped(REQUEUE, said)


def _is_slurm_job(environment: Mapping[str, str]) -> bool:
    return "SLURM_JOB_ID" in environment


def _in_a_row(log_dir: Path) -> int:
    """Return how many attempts up to this one found bad nodes."""
    last, count = attempts.number(log_dir), 1
    while count <= last and (log_dir.with_name(f"attempt_{last - count}") / BAD_NODES).is_file():
        count += 1
    return count


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
