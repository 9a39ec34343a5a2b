"""A run that is interrupted anywhere and resumed on any ranks and workers delivers, and records, what it would have."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_vlmr1.data import handover
from megatron_vlmr1.data.feed import Feed, truncate_ledger
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.data.prefetch import Bounds, Prefetcher, _Worker
from megatron_vlmr1.data.readers import Inline, Reader
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.data.stream import Stream
from tests.data_worker import Forked, KeysOnly

STEPS, BATCH, LANES, WINDOW, SEED = 60, 8, 8, 16, 11
MESH: Any = SimpleNamespace(tp_size=1, pp_size=1)
BUILDER: Any = KeysOnly()


class ForkedPrefetcher(Prefetcher):
    def _start(self) -> _Worker:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            process: Any = Forked(its)
        handover.send(mine, handover.REQUEST)
        mine.setblocking(False)
        return _Worker(process, mine)


def make(top: Path, name: str, rows: int) -> Path:
    lines = [json.dumps({"question": f"{name} {i}", "answer": "1"}) + "\n" for i in range(rows)]
    (top / f"{name}.jsonl").write_text("".join(lines))
    build([top / f"{name}.jsonl"], [top], top / name, shard_bytes=8_000)
    return top / name


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Three sets; a shard of one is gone, a sample of another does not match its checksum."""
    top = tmp_path_factory.mktemp("mixture")
    places = [make(top, name, rows) for name, rows in (("a", 53), ("b", 20), ("c", 9))]
    sorted(places[1].glob("*.tar"))[1].unlink()
    reference = ShardSet.open(places[0]).reference(17)
    with (places[0] / reference.shard).open("r+b") as tar:
        tar.seek(reference.members[0][0])
        tar.write(b"X")
    return Mixture.open([(str(place), weight) for place, weight in zip(places, (3, 2, 1), strict=True)])


def run(mixture: Mixture, begin: int, dp_size: int, workers: int, ledger: Path) -> list[tuple[int, str]]:
    """(position, question) of the steps from `begin` on, as `dp_size` ranks deliver them, in order of positions."""
    out = []
    with ExitStack() as stack:
        feeds = []
        for rank in range(dp_size):
            stream = Stream(mixture, SEED, LANES, WINDOW, rank, dp_size, begin * BATCH)
            reader: Reader = Inline(stream, BUILDER)
            if workers:
                reader = ForkedPrefetcher(stream, "", b"", Bounds(workers, 12, 1 << 30, 1 << 20, 60.0))
            stack.callback(reader.close)
            feeds.append(Feed(stream, reader, MESH, ledger / f"rank_{rank}.jsonl"))
        for _ in range(begin, STEPS):
            step = [(prompt.position, prompt.question) for feed in feeds for prompt, _ in feed.next(BATCH)]
            out += sorted(step)
        assert {feed.consumed for feed in feeds} == {STEPS * BATCH}
    return out


def losses(ledger: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for path in ledger.glob("rank_*.jsonl") for line in path.read_bytes().splitlines()]
    return sorted(rows, key=lambda row: int(row["position"]))


@pytest.mark.timeout(240)
def test_a_run_interrupted_at_25_points_equals_the_whole_one_on_any_ranks_and_workers(
    mixture: Mixture, tmp_path: Path
) -> None:
    whole = run(mixture, 0, 1, 0, tmp_path / "whole")
    lost = losses(tmp_path / "whole")
    positions = sorted([position for position, _ in whole] + [row["position"] for row in lost])
    assert positions == list(range(STEPS * BATCH))
    for name, epochs in (("a", 4), ("b", 8), ("c", 8)):  # 240, 160 and 80 positions of 53, 20 and 9 samples
        counts = [[q for _, q in whole].count(f"{name} {i}") for i in range(53)]
        assert (
            sum(counts) + sum(Path(row["shard"]).parent.name == name for row in lost)
            == {
                "a": 240,
                "b": 160,
                "c": 80,
            }[name]
        )
        assert max(counts) in (epochs, epochs + 1)
    assert {row["reason"].partition(" ")[0] for row in lost} == {"the", "json"} and len(lost) > 20
    points = sorted(np.random.default_rng(6).choice(np.arange(1, STEPS), 25, replace=False).tolist())
    for point in points:
        before = [item for item in whole if item[0] < point * BATCH]
        for dp_size in (1, 2, 4):
            for workers in (0, 2):
                ledger = tmp_path / f"{point}-{dp_size}-{workers}"
                ledger.mkdir()
                for rank in range(2):  # two ranks went a step beyond their last checkpoint
                    rows = [r for r in lost if r["position"] % 2 == rank and r["position"] < (point + 1) * BATCH]
                    (ledger / f"rank_{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                truncate_ledger(ledger, point * BATCH)
                assert before + run(mixture, point, dp_size, workers, ledger) == whole
                assert losses(ledger) == lost


def test_torn_lines_of_a_ledger_do_not_end_the_run_that_resumes(tmp_path: Path) -> None:
    rows = [b'{"position": 1}\n', b'{"position": 2, "sha\n', b"\0\0\0\n", b'"text"\n', b'{"position": 9}\n', b'{"posi']
    (tmp_path / "rank_0.jsonl").write_bytes(b"".join(rows))
    truncate_ledger(tmp_path, 9)
    assert (tmp_path / "rank_0.jsonl").read_bytes() == rows[0]
