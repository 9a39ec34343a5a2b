"""Data workers: the prompts and order of a rank without them; none lost, whoever is killed; no memory leaked."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.data import handover
from megatron_vlmr1.data.handover import Item
from megatron_vlmr1.data.images import ImageProcessor
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.data.prefetch import Prefetcher
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.data.readers import Reader
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.data.tokens import VisionTokens, load_tokenizer
from megatron_vlmr1.rewards import tasks
from megatron_vlmr1.train import loader
from megatron_vlmr1.types import Damage, Sample
from tests.tiny import compressed, picture, write_tiny_checkpoint_files

LANES, WINDOW, SEED = 8, 16, 5


def make_shards(directory: Path, rows: int, side: int = 60) -> Path:
    """Rows of 0, 1 or 2 images; row 3 is longer than any prompt may be."""
    directory.mkdir()
    lines = []
    for i in range(rows):
        names = [f"{i}_{j}.jpg" for j in range(i % 3)]
        for j, name in enumerate(names):
            (directory / name).write_bytes(compressed(picture(side + i, side + j, seed=i)))
        question = "long " * 400 if i == 3 else f"question \ud7ff {i}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"[{i}]"}]
        lines.append(json.dumps({"id": i, "image": names, "conversations": turns, "big": 2**70}) + "\n")
    (directory / "rows.jsonl").write_text("".join(lines))
    build([directory / "rows.jsonl"], [directory], directory / "shards", shard_bytes=30_000)
    return directory / "shards"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    top = tmp_path_factory.mktemp("shards")
    return make_shards(top / "a", 31), make_shards(top / "b", 17)


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    processor, spec = ImageProcessor.from_pretrained(checkpoint), VisionTokens.from_pretrained(checkpoint)
    return PromptBuilder(load_tokenizer(checkpoint), processor, tasks.get("rec").render, None, 400, spec)


def settings(places: Any, **data: Any) -> config.Config:
    data = {"train": places, "max_prompt_tokens": 400, "lanes": LANES, "prefetch": 8, **data}
    return config.parse({"model": {"path": "-"}, "data": data}, "test")


def stream(cfg: config.Config, rank: int = 0, dp_size: int = 1, consumed: int = 0) -> Stream:
    return Stream(Mixture.open(cfg.data.sources), SEED, LANES, WINDOW, rank, dp_size, consumed)


@contextmanager
def reading(
    cfg: config.Config, builder: PromptBuilder, checkpoint: Path, *where: int
) -> Iterator[tuple[Stream, Reader]]:
    source = stream(cfg, *where)
    reader = loader.reader(source, builder, cfg, checkpoint)
    try:
        yield source, reader
    finally:
        reader.close()


def same(left: Item, right: Item) -> bool:
    if isinstance(left, Damage) or isinstance(right, Damage):
        return left == right
    (a, sample), (b, other) = left, right
    arrays = [(x.token_ids, x.mrope_positions, *(i.patches for i in x.images)) for x in (a, b)]
    plain = [
        (x.position, x.key, x.question, x.truth, x.accuracy, [(i.grid_thw, i.size, i.digest) for i in x.images])
        for x in (a, b)
    ]
    dtypes = [[array.dtype for array in row] for row in arrays]
    equal = all(np.array_equal(p, q) for p, q in zip(*arrays, strict=True))
    return equal and dtypes[0] == dtypes[1] and plain[0] == plain[1] and sample == other


def in_memory() -> list[str]:
    """Our files in shared memory, named ones and those that some process here holds open without a name."""
    found = [name for name in os.listdir("/dev/shm") if "vlmr1" in name]
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for fd in Path(f"/proc/{process.pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found += [link] if "memfd:vlmr1" in (link := os.readlink(fd)) else []
    return found


def comes_to_hold(files: int) -> bool:
    """Whether there are so many of them, once a worker has closed its side of those that it has just sent."""
    end = time.monotonic() + 20
    while len(in_memory()) != files and time.monotonic() < end:
        time.sleep(0.05)
    return len(in_memory()) == files


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_workers_deliver_what_the_rank_itself_would(shards, builder, checkpoint):
    descriptors = open_descriptors()
    places = [{"path": str(shards[0]), "weight": 2}, {"path": str(shards[1])}]
    with (
        reading(settings(places), builder, checkpoint) as (alone, inline),
        reading(settings(places, workers=2), builder, checkpoint) as (helped, ahead),
    ):
        items: list[tuple[Item, Item]] = []
        for n in (8, 16, 8, 40, 24):  # more at once than may be ahead, and less
            items += zip(inline.read(alone.take(n)), ahead.read(helped.take(n)), strict=True)
        assert len(items) == 96 and all(same(left, right) for left, right in items)
        lost = [left.reason for left, _ in items if isinstance(left, Damage)]
        assert len(lost) == 4 and all("longer than data.max_prompt_tokens=400" in reason for reason in lost)
        samples = [right[1] for _, right in items if not isinstance(right, Damage)]
        assert all(sample.images == () and sample.extra["big"] == 2**70 for sample in samples)
        assert isinstance(ahead, Prefetcher)
        while len(ahead._done) < 8:
            ahead._take_all(1.0)
        assert comes_to_hold(8)
        assert not any("libtorch" in m.path for pid in ahead.pids for m in psutil.Process(pid).memory_maps())
        pids = ahead.pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert in_memory() == [] and open_descriptors() == descriptors


def test_no_further_ahead_than_the_bounds(shards, builder, checkpoint):
    one = builder.largest_bytes
    assert one == 400 * 4 * 3 * 28 * 28
    for bounds in ({"prefetch": 5}, {"prefetch_bytes": 3 * one}, {"prefetch_bytes": 1}):
        cfg = settings(str(shards[0]), workers=1, **bounds)
        with reading(cfg, builder, checkpoint) as (source, reader):
            assert isinstance(reader, Prefetcher)
            for _ in range(8):
                reader.read(source.take(1))
                ahead = reader._next - source.consumed
                taken = reader._done_bytes + (ahead - len(reader._done)) * one
                assert ahead <= cfg.data.prefetch and (taken <= cfg.data.prefetch_bytes or ahead == 1)
                assert ahead >= min(cfg.data.prefetch, 1 + 2 * (cfg.data.prefetch_bytes >= 3 * one))
            while len(reader._done) < ahead:
                reader._take_all(1.0)
            assert sum(os.fstat(fd).st_size for fd in reader._done.values()) == reader._done_bytes


def test_killed_workers_are_replaced_and_nothing_is_lost(shards, builder, checkpoint):
    cfg = settings(str(shards[0]), workers=2)
    with (
        reading(cfg, builder, checkpoint) as (helped, ahead),
        reading(settings(str(shards[0])), builder, checkpoint) as (alone, inline),
    ):
        assert isinstance(ahead, Prefetcher)
        for step, harm in enumerate((signal.SIGKILL, None, signal.SIGKILL, None)):
            if harm:
                for pid in ahead.pids[: 1 + step // 2]:
                    os.kill(pid, harm)
            pairs = zip(ahead.read(helped.take(16)), inline.read(alone.take(16)), strict=True)
            assert all(same(left, right) for left, right in pairs)
        assert all(psutil.Process(pid).is_running() for pid in ahead.pids)


def own_task(path: Path, body: str) -> str:
    """A task whose `render` does `body` first."""
    text = (
        "import os, time\nfrom dataclasses import fields\nfrom megatron_vlmr1.rewards.task import Task\n"
        "from megatron_vlmr1.rewards.tasks.rec import TASK as rec\n\nclass Own(Task):\n"
        f"    def render(self, question):\n        {body}\n        return super().render(question)\n\n"
        "TASK = Own(**{f.name: getattr(rec, f.name) for f in fields(rec)})\n"
    )
    path.write_text(text)
    return str(path)


def test_a_hung_worker_is_replaced(shards, builder, checkpoint, tmp_path):
    body = (
        f"if question.endswith(' 5') and not os.path.exists({str(tmp_path / 'hung')!r}):"
        f" open({str(tmp_path / 'hung')!r}, 'w').close(); time.sleep(1000)"
    )
    cfg = settings(str(shards[0]), workers=1, worker_timeout_s=2.0)
    cfg = cfg.model_copy(update={"task": own_task(tmp_path / "own.py", body)})
    with (
        reading(cfg, builder, checkpoint) as (helped, ahead),
        reading(settings(str(shards[0])), builder, checkpoint) as (alone, inline),
    ):
        assert isinstance(ahead, Prefetcher)
        first = ahead.pids
        pairs = zip(ahead.read(helped.take(32)), inline.read(alone.take(32)), strict=True)
        assert all(same(left, right) for left, right in pairs)
        assert (tmp_path / "hung").exists() and ahead.pids != first


def test_a_sample_that_kills_workers_is_damage(shards, builder, checkpoint, tmp_path):
    cfg = settings(str(shards[0]), workers=1)
    body = "if question.endswith(' 5'): os.kill(os.getpid(), 9)"
    cfg = cfg.model_copy(update={"task": own_task(tmp_path / "own.py", body)})
    with (
        reading(cfg, builder, checkpoint) as (helped, ahead),
        reading(settings(str(shards[0])), builder, checkpoint) as (alone, inline),
    ):
        fatal = 0
        for left, right in zip(ahead.read(helped.take(24)), inline.read(alone.take(24)), strict=True):
            if not isinstance(right, Damage) and right[0].question.endswith(" 5"):
                assert left == Damage("", "", "3 data workers died on it")
                fatal += 1
            else:
                assert same(left, right)
        assert fatal == 1


def test_what_workers_refuse_is_one_line_and_frees_everything(shards, builder, checkpoint, tmp_path):
    descriptors = open_descriptors()
    cfg = settings(str(shards[0]), workers=2).model_copy(update={"task": "nonsense"})
    with pytest.raises(ValueError, match="no task named nonsense"):  # noqa: PT012
        with reading(cfg, builder, checkpoint) as (source, reader):
            reader.read(source.take(8))
    assert in_memory() == [] and open_descriptors() == descriptors
    (tmp_path / "own.py").write_text("import os\nos._exit(3)\n")
    cfg = cfg.model_copy(update={"task": str(tmp_path / "own.py")})
    with pytest.raises(RuntimeError, match="end with 3 before they have started"):  # noqa: PT012
        with reading(cfg, builder, checkpoint) as (source, reader):
            reader.read(source.take(8))
    assert in_memory() == [] and open_descriptors() == descriptors


RANK = """
import json, sys, time
from pathlib import Path
from megatron_vlmr1 import config
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.data.prefetch import Bounds, Prefetcher
from megatron_vlmr1.data.stream import Stream
raw, checkpoint = json.loads(sys.argv[1]), sys.argv[2]
cfg = config.parse(raw, "test")
stream = Stream(Mixture.open(cfg.data.sources), 5, 8, 16, 0, 1)
setup = json.dumps({"checkpoint": checkpoint, "task": "rec", "data": raw["data"]}).encode()
reader = Prefetcher(stream, "megatron_vlmr1.train.loader", setup, Bounds(2, 8, 1 << 30, 1 << 20, 60.0))
while len(reader._done) < 8:
    reader._take_all(1.0)
print(*reader.pids, flush=True)
time.sleep(1000)
"""


def test_workers_die_with_a_killed_rank_and_leave_no_memory(shards, checkpoint):
    raw = settings(str(shards[0]), workers=2).model_dump(mode="json")
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, json.dumps(raw), str(checkpoint)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert rank.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        assert len(workers) == 2 and comes_to_hold(8)
    finally:
        rank.kill()
        rank.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert len(gone) == 2 and alive == [] and in_memory() == []


def test_short_memory_is_an_error(builder):
    item = builder.build(7, Sample("k", "q", "t", (compressed(picture(60, 60)),)))
    fd = handover.memory(handover.parts_of((item, Sample("k", "q", "t"))))
    os.ftruncate(fd, os.fstat(fd).st_size - 1)
    with pytest.raises(ValueError, match="shorter than it says"):
        handover.read_item(fd)
    os.close(fd)


def test_memory_is_written_over(builder):
    fd = handover.memory([bytes(10_000_000)])
    for size in (200, 60, 120):
        sample = Sample("k", "q" * size, "t", (compressed(picture(size, size)),))
        item = builder.build(7, sample), Sample("k", "q", "t")
        assert handover.memory(handover.parts_of(item), fd) == fd and same(handover.read_item(fd), item)
    lost = Damage("s", "k", "r")
    assert handover.read_item(handover.memory(handover.parts_of(lost), fd)) == lost
    os.close(fd)


def test_last_words_are_heard_of_a_worker_that_left_messages_unread():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near:
        handover.send(near, handover.REQUEST, 1, b"unread")
        handover.send(far, handover.REFUSED, 0, b"why")
        far.close()
        assert handover.receive(near) == (handover.REFUSED, 0, b"why", None)
        assert handover.receive(near) is None


def test_large_bodies_travel_in_memory():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        for size, spare in ((0, None), (10, None), (10_000_000, None), (50_000, handover.memory([bytes(60_000)]))):
            handover.send(left, handover.REQUEST, 2**60, bytes(size), spare)
            kind, position, body, fd = handover.receive(right)
            assert (kind, position) == (handover.REQUEST, 2**60) and (fd is None) == (size < 1000)
            assert handover.body_of(body, fd) == bytes(size)
        left.close()
        assert handover.receive(right) is None
