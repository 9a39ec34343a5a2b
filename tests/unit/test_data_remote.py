"""Shards of URLs against a server of our own: whole, garbled, cut, stalled, gone; the cache stays in its bounds."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_vlmr1.data import remote
from megatron_vlmr1.data.cache import Cache
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.types import Damage, Sample
from tests.tiny import compressed, picture

ROWS = 40


class Server(ThreadingHTTPServer):
    """Serves a folder; `harm` says what is done to which file's body, `asked` counts requests."""

    daemon_threads = False  # closing waits for them: no connection is left open for the next test

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.harm: dict[str, str] = {}
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def connection_is_cut(self) -> bool:
        try:
            self.wfile.write(bytes(2000))
        except OSError:
            return True
        return False

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        assert isinstance(self.server, Server)
        self.server.asked[name] += 1
        harm = self.server.harm.get(name, "")
        if harm == "once":
            self.server.harm.pop(name)
        path = Path(self.directory) / name
        if harm == "missing" or not path.is_file():
            return self.send_error(404)
        body = path.read_bytes()
        whole = len(body)
        if harm in ("cut", "stall", "once"):
            body = body[: whole // 2]
        if harm == "garbage":
            body = b"<html>please log in</html>" * 4
            whole = len(body)
        if harm == "flip":
            body = bytes(byte ^ 255 if i % 4000 == 0 else byte for i, byte in enumerate(body))
        if harm in ("endless", "drip"):
            whole = 1 << 40
        self.send_response(200)
        self.send_header("Content-Length", str(whole))
        self.end_headers()
        self.wfile.write(body)
        if harm == "stall":
            self.connection.recv(1)  # until the client gives up
        while harm == "drip" and not self.connection_is_cut():
            time.sleep(0.02)
        while harm == "endless":
            self.wfile.write(bytes(1 << 16))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("served")
    lines = []
    for i in range(ROWS):
        (top / f"{i}.jpg").write_bytes(compressed(picture(50, 50, seed=i)))
        turns = [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"{i}"}]
        lines.append(json.dumps({"image": f"{i}.jpg", "conversations": turns}) + "\n")
    (top / "rows.jsonl").write_text("".join(lines))
    build([top / "rows.jsonl"], [top], top / "shards", shard_bytes=32_000)
    return top / "shards"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(built: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(built, tmp_path / "served")
    with Server(tmp_path / "served") as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def cache(tmp_path: Path, limit: int = 10**9, timeout_s: float = 1.0) -> Cache:
    return Cache(tmp_path / "cache", limit, timeout_s)


def held(tmp_path: Path) -> list[Path]:
    return sorted(
        p for p in (tmp_path / "cache" / "vlmr1-shards").rglob("*") if p.is_file() and p.suffix in (".tar", ".part")
    )


def test_a_url_delivers_what_the_folder_does(server: Server, built: Path, tmp_path: Path) -> None:
    here, there = ShardSet.open(built), ShardSet.open(server.url + "/", cache(tmp_path))
    assert there.digest() == here.digest() and len(there) == ROWS and len(there.names) >= 4
    assert held(tmp_path) == []  # shards are fetched when they are read
    for _ in range(2):
        assert [there.read(i) for i in range(ROWS)] == [here.read(i) for i in range(ROWS)]
    assert all(server.asked[name] == 1 for name in there.names)
    again = ShardSet.open(server.url, cache(tmp_path))
    assert isinstance(again.read(0), Sample) and server.asked[again.names[0]] == 1


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("missing", "cannot be fetched: refused or not found"),
        ("cut", "cannot be fetched: the connection was cut after"),
        ("stall", "cannot be fetched: nothing came for 0.3 s after"),
        ("garbage", "nothing of what the server sends matches the index"),
        ("", ""),
        ("once", ""),
        ("endless", ""),
    ],
)
def test_each_loss_is_damage_and_the_rest_arrives(
    server: Server, built: Path, tmp_path: Path, harm: str, reason: str
) -> None:
    there, here = ShardSet.open(server.url, cache(tmp_path, timeout_s=0.3)), ShardSet.open(built)
    bad = there.names[1]
    server.harm[bad] = harm
    lost = 0
    for i in range(ROWS):
        item = there.read(i)
        if here.locate(i)[0] == bad and reason:
            assert isinstance(item, Damage) and (item.shard, item.key) == here.locate(i) and reason in item.reason
            lost += 1
        else:
            assert item == here.read(i)
    assert (lost > 0) == bool(reason)
    assert server.asked[bad] == {"": 1, "once": 2, "endless": 1}.get(harm, 3)
    names = {path.name.split("-")[0] + "-" + path.name.split("-")[1] + ".tar" for path in held(tmp_path)}
    assert names == set(there.names) - ({bad} if reason else set())


def test_of_a_garbled_shard_arrives_what_is_whole(server: Server, built: Path, tmp_path: Path) -> None:
    there, here = ShardSet.open(server.url, cache(tmp_path)), ShardSet.open(built)
    server.harm[there.names[0]] = "flip"
    items = [(there.read(i), here.read(i)) for i in range(ROWS)]
    lost = [left for left, _ in items if isinstance(left, Damage)]
    assert 0 < len(lost) < len([i for i in range(ROWS) if here.locate(i)[0] == there.names[0]])
    assert all("does not match its checksum" in item.reason for item in lost)
    assert all(left == right for left, right in items if not isinstance(left, Damage))


def test_a_server_that_is_gone(server: Server, tmp_path: Path) -> None:
    there = ShardSet.open(server.url, cache(tmp_path))
    first = there.read(0)
    server.shutdown()
    server.server_close()
    assert there.read(0) == first  # from the cache
    started = time.monotonic()
    lost = [there.read(i) for i in range(ROWS) if there.locate(i)[0] != there.names[0]]
    assert time.monotonic() - started < 30
    assert all(isinstance(item, Damage) and "no connection" in item.reason for item in lost)
    with pytest.raises(ValueError, match=rf"^{server.url}/shards.json: no connection after 0 bytes$"):
        ShardSet.open(server.url, cache(tmp_path / "other"))


def test_an_index_that_changes_is_no_other_data(server: Server, tmp_path: Path) -> None:
    there = ShardSet.open(server.url, cache(tmp_path))
    folder = tmp_path / "served"
    one, two = (folder / name for name in there.names[:2])
    for suffix in (".tar", ".index"):
        shutil.copy(two.with_suffix(suffix), one.with_suffix(suffix))
    lost = there.read(0)
    assert isinstance(lost, Damage) and "its index is not the one that the run was started with" in lost.reason


def test_the_cache_stays_within_its_bytes(server: Server, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in (tmp_path / "served").glob("*.tar"))
    there = ShardSet.open(server.url, cache(tmp_path, limit=2 * largest))
    orphan = tmp_path / "cache" / "vlmr1-shards" / "0123" / "shard-000000-0.part"
    mine = tmp_path / "cache" / "mine" / "shard-000000.tar"
    for path in (orphan, mine):
        path.parent.mkdir(parents=True)
    mine.write_bytes(bytes(3 * largest))  # in the user's folder, but none of ours
    orphan.write_bytes(bytes(largest))
    orphan.with_suffix(".lock").touch()
    for _ in range(2):
        for i in range(ROWS):
            assert isinstance(there.read(i), Sample)
            assert sum(path.stat().st_size for path in held(tmp_path)) <= 2 * largest
    assert not orphan.exists() and mine.exists() and len(held(tmp_path)) == 2
    assert {path.parent for path in held(tmp_path)} == {held(tmp_path)[0].parent}
    # What was used last stays; what is being read stays too.
    kept = there.remote.open(*there.reference(0)[:3])
    [there.read(i) for i in range(ROWS)]
    again = os.fstat(kept)
    assert again.st_nlink == 1
    os.close(kept)
    with pytest.raises(ValueError, match=r"data.cache_bytes=1000 is too small for http.*/shard-000000.tar"):
        ShardSet.open(server.url, cache(tmp_path, limit=1000))


def test_many_readers_fetch_a_shard_once(server: Server, built: Path, tmp_path: Path) -> None:
    here = ShardSet.open(built)
    sets = [ShardSet.open(server.url, cache(tmp_path, timeout_s=20.0)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda shards: [shards.read(i) for i in range(ROWS)], sets))
    assert all(items == [here.read(i) for i in range(ROWS)] for items in results)
    assert all(server.asked[name] == 1 for name in here.names)


def test_ranks_that_start_together_fetch_each_index_once(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: ShardSet.open(server.url, cache(tmp_path, timeout_s=20.0)), range(4)))
    assert len({shards.digest() for shards in sets}) == 1 and len(sets[0]) == ROWS
    assert set(server.asked.values()) == {1} and len(server.asked) == 1 + len(sets[0].names)
    for path in (tmp_path / "cache").rglob("*.fetched"):
        os.utime(path, (0, time.time() - 61))
    ShardSet.open(server.url, cache(tmp_path))
    assert set(server.asked.values()) == {2}


def test_readers_that_wait_for_one_that_fails_do_not_try_again(server: Server, tmp_path: Path) -> None:
    sets = [ShardSet.open(server.url, cache(tmp_path, timeout_s=20.0)) for _ in range(4)]
    bad = sets[0].names[0]
    server.harm[bad] = "missing"
    with ThreadPoolExecutor(4) as pool:
        lost = list(pool.map(lambda shards: shards.read(0), sets))
    assert server.asked[bad] == 3 and len(set(map(str, lost))) == 1
    assert isinstance(lost[0], Damage) and "refused or not found" in lost[0].reason
    server.harm.clear()
    assert isinstance(ShardSet.open(server.url, cache(tmp_path)).read(0), Sample)  # a run that starts later asks


def test_a_server_that_drips_has_failed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_MIN_BYTES_PER_S", 10_000_000)
    server.harm["shard-000000.tar"] = "drip"
    with pytest.raises(OSError, match="too slow: [0-9]+ bytes"):
        remote.fetch(f"{server.url}/shard-000000.tar", lambda data: None, 1 << 32, 0.5)


def test_readers_share_a_small_cache(server: Server, built: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in built.glob("*.tar"))
    here = ShardSet.open(built)
    sets = [ShardSet.open(server.url, cache(tmp_path, limit=2 * largest, timeout_s=20.0)) for _ in range(3)]
    orders = [range(ROWS), range(ROWS - 1, -1, -1), [*range(ROWS // 2, ROWS), *range(ROWS // 2)]]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda pair: [pair[0].read(i) for i in pair[1]], zip(sets, orders, strict=True)))
    for items, order in zip(results, orders, strict=True):
        assert items == [here.read(i) for i in order]
    assert sum(path.stat().st_size for path in held(tmp_path)) <= 2 * largest


def test_a_url_needs_a_cache() -> None:
    with pytest.raises(ValueError, match="with data.cache_dir set"):
        ShardSet.open("http://host/shards")


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch /tmp/x",
        "pipe:touch x://y",
        "file:///etc",
        "ftp://host/dir",
        "http://host/a b",
        "http://host/{a,b}",
        "http://host/x?y=z",
        "http://host/[1-9]",
        "http://host/x\n",
        "-http://host/x",
        "scp://host/x",
    ],
)
def test_urls_that_are_refused(url: str, tmp_path: Path) -> None:
    says = "commands are refused" if url.startswith("pipe:") else "not a URL of shards"
    with pytest.raises(ValueError, match=says):
        ShardSet.open(url, cache(tmp_path))
    with pytest.raises(ValueError, match=says):
        ShardSet.open(url)
    with pytest.raises(ValueError, match=says):
        remote.fetch(url, lambda data: None, 1, 1.0)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("names", [["../x.tar"], ["/etc/x.tar"], ["a/b.tar"], [".tar"], ["x.pkl"], [1], "x.tar"])
def test_a_manifest_names_nothing_outside(server: Server, tmp_path: Path, names: object) -> None:
    (tmp_path / "served" / "shards.json").write_text(json.dumps({"shards": names}))
    with pytest.raises(ValueError, match="shards.json: not a manifest of shards"):
        ShardSet.open(server.url, cache(tmp_path))


def test_hostile_indexes_are_one_line(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "served" / "shard-000000.index"
    good = path.read_bytes()
    header, _, body = good.partition(b"\n")
    for bad in (
        b"",
        b"{}",
        good[:-1],
        header + b"\n",
        json.dumps(json.loads(header) | {"samples": 10**30}).encode() + b"\n" + body,
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"shard-000000.index: .+") as caught:
            ShardSet.open(server.url, cache(tmp_path))
        assert "\n" not in str(caught.value)
