"""The reward service under fire: nothing hangs, nothing is lost, and a failure is never a zero."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from megatron_vlmr1.config import RewardsConfig
from megatron_vlmr1.rewards import tasks, wire
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.rewards.judges import Judges
from megatron_vlmr1.rewards.service import RewardService
from megatron_vlmr1.types import Score
from tests.distributed import ranks

OWN = Path(__file__).parent / "own_rewards.py"
DEADLINE_S = 1.5
CONFIG = RewardsConfig(workers=2, deadline_s=DEADLINE_S, memory_bytes=1 << 30)
TIMEOUT_S = 60.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RewardService]:
    with RewardService(CONFIG, tmp_path, [OWN]) as running:
        yield running


@pytest.fixture
def client(service: RewardService) -> Iterator[RewardClient]:
    with RewardClient(service.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardClient]:
    """A client of a service that nobody kills, for tests of what it answers."""
    folder = tmp_path_factory.mktemp("unharmed")
    with RewardService(CONFIG, folder, [OWN]) as running, RewardClient(running.address) as connected:
        yield connected


def submit(client: RewardClient, item_id: int | str, reward: str, completion: str = "", solution: str = "") -> None:
    client.submit(item_id, RewardItem(completion, solution), {reward: 1.0})


def eventually(what: Callable[[], bool], timeout_s: float = 20.0) -> float:
    """Wait until `what()` and return how long that took, in seconds."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < timeout_s, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - start


def announced(mark: Path) -> list[int]:
    """Process ids written by the reward `announce`, oldest first."""
    return [int(path.read_text() or 0) for path in sorted(mark.parent.glob(f"{mark.name}.*"))]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_scores_arrive_weighted(unharmed: RewardClient) -> None:
    item = RewardItem("<think></think><answer>[0, 0, 10, 10]</answer>", "[0, 0, 10, 20]")
    unharmed.submit("one", item, {"iou": 2.0, "format": 0.5})
    unharmed.submit(2, item, {"iou": 1.0, "nope": 1.0})
    scores = unharmed.collect(["one", 2], TIMEOUT_S)
    assert scores["one"] == Score(1.5, {"iou": 0.5, "format": 1.0})
    assert scores[2].value is None
    assert "no reward named nope" in str(scores[2].failure)


def test_many_clients_keep_their_items_apart(service: RewardService) -> None:
    clients = [RewardClient(service.address) for _ in range(3)]
    for number in range(1000):  # more than a client's window
        for k, client in enumerate(clients):
            submit(client, number, "echo", str(10_000 * k + number))
    for k, client in enumerate(clients):
        scores = client.collect(range(1000), TIMEOUT_S)
        assert [score.value for score in scores.values()] == [10_000.0 * k + number for number in range(1000)]
        assert client.poll() == 0
        client.close()


def test_workers_are_slim_and_nobodys_rank(client: RewardClient) -> None:
    submit(client, 0, "torch_free")
    assert client.collect([0], TIMEOUT_S)[0].value == 1.0
    eventually(lambda: len(client.stats()["worker_pids"]) == CONFIG.workers)
    stats = client.stats()
    assert len(set(stats["worker_pids"]) | {stats["service_pid"], os.getpid()}) == CONFIG.workers + 2
    assert 0 < stats["latency_p50_s"] <= stats["latency_p99_s"] < TIMEOUT_S


def test_kill_a_worker_in_the_middle(service: RewardService, client: RewardClient, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    submit(client, "victim", "announce", "0.7", str(mark))
    for number in range(50):
        submit(client, number, "echo", str(number))
    eventually(lambda: client.poll() >= 0 and len(announced(mark)) == 1)
    os.kill(announced(mark)[0], signal.SIGKILL)
    scores = client.collect(["victim", *range(50)], TIMEOUT_S)
    assert scores["victim"].value == 1.0
    assert [scores[number].value for number in range(50)] == list(range(50))
    assert len(announced(mark)) == 2, "tried once more"
    assert len(set(announced(mark))) == 2, "by another process"
    assert re.search(
        r"worker died \(exit code -9\): \d+ items tried once more, 0 given up", service.log_path.read_text()
    )
    assert client.stats()["failures"] == {}


def test_kill_an_idle_worker(client: RewardClient) -> None:
    eventually(lambda: len(client.stats()["worker_pids"]) == CONFIG.workers)
    before = set(client.stats()["worker_pids"])
    os.kill(min(before), signal.SIGKILL)
    assert eventually(lambda: len(set(client.stats()["worker_pids"]) - {min(before)}) == CONFIG.workers) < 5
    for number in range(20):
        submit(client, number, "echo", "1")
    assert all(score.value == 1.0 for score in client.collect(range(20), TIMEOUT_S).values())


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("hang", "deadline of 1.5 s exceeded"),
        ("stop", "deadline of 1.5 s exceeded"),
        ("die", "worker died (exit code -9)"),
    ],
)
def test_an_item_that_takes_its_process_along(client: RewardClient, reward: str, reason: str) -> None:
    """It fails after two tries; its neighbours don't."""
    for number in range(40):
        submit(client, number, "echo", "2")
    submit(client, "bad", reward)
    for number in range(40, 80):
        submit(client, number, "echo", "2")
    scores = client.collect(["bad", *range(80)], TIMEOUT_S)
    assert scores.pop("bad") == Score(None, failure=reason)
    assert [score.value for score in scores.values()] == [2.0] * 80
    stats = client.stats()
    assert stats["failures"] == {reason: 1}
    assert stats["retried"] >= 1


def test_a_hang_ends_at_its_deadline(client: RewardClient) -> None:
    submit(client, "warm", "echo", "1")
    client.collect(["warm"], TIMEOUT_S)
    eventually(lambda: len(client.stats()["worker_pids"]) == CONFIG.workers)
    submit(client, "bad", "hang")
    start = time.monotonic()
    assert client.collect(["bad"], TIMEOUT_S)["bad"].failure
    assert 2 * DEADLINE_S <= time.monotonic() - start < 2 * DEADLINE_S + 4


def test_a_memory_bomb_stays_inside(client: RewardClient) -> None:
    before = psutil.Process().memory_info().rss
    submit(client, "bomb", "bomb")
    assert client.collect(["bomb"], TIMEOUT_S)["bomb"].failure == "bomb: out of memory"
    assert psutil.Process().memory_info().rss - before < 50 << 20


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("none", "odd: returned NoneType, not a number"),
        ("nan", "odd: returned nan"),
        ("text", "odd: returned str, not a number"),
        ("true", "odd: returned bool, not a number"),
        ("huge", "odd: OverflowError: int too large to convert to float"),
        ("exit", "odd: SystemExit: 3"),
        ("recursion", "odd: RecursionError"),
        ("else", "odd: KeyError: '\\ud800 surrogate'"),
    ],
)
def test_a_reward_that_is_none(unharmed: RewardClient, what: str, reason: str) -> None:
    submit(unharmed, 0, "odd", what)
    submit(unharmed, 1, "echo", "1")
    scores = unharmed.collect([0, 1], TIMEOUT_S)
    assert str(scores[0].failure).startswith(reason)
    assert scores[1].value == 1.0


def test_kill_the_service(service: RewardService, client: RewardClient, tmp_path: Path) -> None:
    """Every client gets every score, also one that is not in the process that restarts the service."""
    mark = tmp_path / "mark"
    command = [sys.executable, "-c", OTHER_RANK, service.address, str(mark)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    submit(client, "slow", "announce", "1.0", str(mark))
    for number in range(700):
        submit(client, number, "echo", str(number))
    eventually(lambda: client.poll() >= 0 and len(announced(mark)) == 2)
    first = client.stats()
    os.kill(first["service_pid"], signal.SIGKILL)
    scores = client.collect(["slow", *range(700)], TIMEOUT_S)
    assert scores["slow"].value == 1.0
    assert [scores[number].value for number in range(700)] == list(range(700))
    assert other.communicate(timeout=TIMEOUT_S)[0] == "701 scores\n"
    assert len(announced(mark)) == 4, "both ranks' slow items began twice"
    assert service.restarts == 1
    assert client.stats()["service_pid"] != first["service_pid"]
    eventually(lambda: all(map(gone, first["worker_pids"])), 5)


OTHER_RANK = """
import sys
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.item import RewardItem
with RewardClient(sys.argv[1]) as client:
    client.submit("slow", RewardItem("1.0", sys.argv[2]), {"announce": 1.0})
    for number in range(700):
        client.submit(number, RewardItem("1", ""), {"echo": 1.0})
    scores = client.collect(["slow", *range(700)], 60)
    print(sum(score.value == 1.0 for score in scores.values()), "scores")
"""


def test_a_hung_service_is_replaced(
    service: RewardService, client: RewardClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_vlmr1.rewards.service._HUNG_S", 2.0)
    os.kill(client.stats()["service_pid"], signal.SIGSTOP)
    submit(client, 0, "echo", "5")
    assert client.collect([0], TIMEOUT_S)[0].value == 5.0
    assert service.restarts == 1


def test_without_a_service_collect_ends(tmp_path: Path) -> None:
    with RewardClient(f"ipc://{tmp_path}/none") as client:
        submit(client, 0, "echo", "1")
        assert client.poll() == 1
        start = time.monotonic()
        assert client.collect([0], 0.5) == {0: Score(None, failure="no answer from the reward service within 0.5 s")}
        assert 0.5 <= time.monotonic() - start < 2
        assert client.poll() == 0
        with pytest.raises(TimeoutError):
            client.stats(0.2)


def test_a_service_that_does_not_answer_costs_its_figures_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = RewardClient.stats
    monkeypatch.setattr(RewardClient, "stats", lambda client: patient(client, 0.1))
    with ranks.alone() as mesh:
        judges = Judges(f"ipc://{tmp_path}/none", tasks.get("rec"), RewardsConfig(), mesh, True, 60.0, "qwen2_5_vl")
        assert judges.stats() == {}
        names = ("reward/latency_p50_s", "reward/latency_p99_s", "reward/queue_depth")
        assert judges.take_metrics() == dict.fromkeys(names, 0.0)
        judges.close()


def test_the_service_outlives_its_log(service: RewardService, client: RewardClient) -> None:
    pid = client.stats()["service_pid"]
    service.log_path.unlink()
    time.sleep(1.5)  # three looks at the log
    os.kill(pid, signal.SIGKILL)
    submit(client, 0, "echo", "5")
    assert client.collect([0], TIMEOUT_S)[0].value == 5.0 and service.restarts == 1


FLOOD = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
while True:
    socket.send(bytes.fromhex("91a57374617473"))  # ["stats"]
"""


def test_clients_that_never_pause_hold_nobody_up(service: RewardService, client: RewardClient) -> None:
    for number in range(5000):  # whose latencies are sorted for each answer
        submit(client, number, "echo", "1")
    client.collect(range(5000), TIMEOUT_S)
    floods = [subprocess.Popen([sys.executable, "-c", FLOOD, service.address]) for _ in range(3)]
    time.sleep(1.5)
    start = time.monotonic()
    submit(client, -1, "echo", "5")
    try:
        assert client.collect([-1], 10)[-1].value == 5.0 and time.monotonic() - start < 3
    finally:
        for flood in floods:
            flood.kill()
            flood.wait()


def test_a_message_too_long_never_leaves(unharmed: RewardClient) -> None:
    submit(unharmed, 0, "echo", "x" * (wire.MAX_ITEM_BYTES + 1))
    submit(unharmed, 1, "echo", "1")
    scores = unharmed.collect([0, 1], TIMEOUT_S)
    assert str(scores[0].failure).startswith("too_long")
    assert scores[1].value == 1.0


def test_garbage_on_the_socket_is_refused(service: RewardService, client: RewardClient) -> None:
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(service.address)
    garbage = [
        [b""],
        [b"\xc1"],
        [b"\x93\x01"],
        [wire.pack("score")],
        [wire.pack(["score", [1, 2]]), b"one payload"],
        [wire.pack(["score", ["1"]]), b""],
        [wire.pack(["ping", None])],
        [wire.pack({"a": 1})],
        [b"\xdd\xff\xff\xff\xff"],
        [b"\x91" * 100_000],
        [b"x" * (wire.MAX_ITEM_BYTES + 5000)],
        [wire.pack(["score", [1, 2, 3]]), b"\xc1", wire.pack([["echo"], 3]), wire.pack([[["echo"]], {}])],
    ]
    for frames in garbage:
        stranger.send_multipart(frames)
    for number in range(20):
        submit(client, number, "echo", "1")
    assert all(score.value == 1.0 for score in client.collect(range(20), TIMEOUT_S).values())
    assert service.restarts == 0
    stranger.close(0)
    context.term()


def test_no_orphans_after_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path), str(OWN)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 1 + CONFIG.workers
    family = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
    assert set(pids) <= set(family)
    parent.kill()
    parent.wait()
    eventually(lambda: all(map(gone, family)), 5)


PARENT = """
import sys, time
from pathlib import Path
from megatron_vlmr1.config import RewardsConfig
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.rewards.service import RewardService
config = RewardsConfig(workers=2, deadline_s=60)
with RewardService(config, Path(sys.argv[1]), [Path(sys.argv[2])]) as service, RewardClient(service.address) as client:
    for number in range(2):  # busy processes: they see no closed pipe
        client.submit(number, RewardItem("50", sys.argv[1] + "/mark"), {"announce": 1.0})
    while len(list(Path(sys.argv[1]).glob("mark.*"))) < 2:
        client.poll(0.05)
    stats = client.stats()
    print(stats["service_pid"], *stats["worker_pids"], flush=True)
    time.sleep(60)
"""


def test_close_leaves_nothing(tmp_path: Path) -> None:
    others = {child.pid for child in psutil.Process().children(recursive=True)}  # left by tests before this one
    with RewardService(CONFIG, tmp_path, [OWN]) as service, RewardClient(service.address) as client:
        eventually(lambda: len(client.stats()["worker_pids"]) == CONFIG.workers)
        family = {child.pid for child in psutil.Process().children(recursive=True)} - others
        assert len(family) > CONFIG.workers
        socket_path = Path(service.address.removeprefix("ipc://"))
        assert socket_path.exists()
    eventually(lambda: all(map(gone, family)), 5)
    assert not socket_path.parent.exists()
    assert service.log_path.read_text().rstrip().endswith("stopped")


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (RewardsConfig(memory_bytes=1000), [], "memory_bytes must be at least"),
        (RewardsConfig(), [Path("/none.py")], "/none.py: no such file"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, config: RewardsConfig, files: list[Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardService(config, tmp_path, files)


def test_a_long_temporary_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(ValueError, match="set TMPDIR to a shorter one"):
        RewardService(CONFIG, tmp_path)
    assert not list(long.iterdir())
