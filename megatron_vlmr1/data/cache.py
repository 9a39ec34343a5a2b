"""Shards of URLs in a local folder of bounded size, shared by all processes of a node.

A shard is fetched once, under a lock of its own, into a file that takes its name only when it is complete; the room for
it is set aside before. What was used longest ago makes room, unless somebody is reading it. The kernel lets go of the
locks of a process that dies, and what it left half-written is cleared away by the next that needs room.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from megatron_vlmr1.config import DataConfig
from megatron_vlmr1.data.index import MANIFEST, ShardIndex, index_path, parse_index, parse_manifest
from megatron_vlmr1.data.remote import Tick, check_url, fetch
from megatron_vlmr1.telemetry.files import write_atomic

logger = logging.getLogger(__name__)
_Parsed = TypeVar("_Parsed")

_ATTEMPTS = 3
_ASK_AGAIN_S = 300.0  # so long a shard that could not be fetched is not asked for again
_FRESH_S = 60.0  # so long the ranks of a node, which start together, take an index that one of them has fetched
_POLL_S = 0.05
_INDEX_BYTES = 4 << 30  # no index is as large
_THREADS = 8


class Cache:
    """Brings shards of URLs (`reading.Opens`) and their indexes (`index.Remote`).

    Args:
        directory: the folder; nothing is written outside it.
        limit_bytes: shards in it take no more than this.
        timeout_s: longest silence of a server, and longest wait for room.
        tick: is called at least twice a second while something is fetched.
    """

    def __init__(self, directory: Path, limit_bytes: int, timeout_s: float, tick: Tick = lambda: None) -> None:
        # A folder of its own: what makes room must be ours, also where the user names a folder with other shards.
        self.directory = directory / "vlmr1-shards"
        self.limit_bytes, self.timeout_s, self._tick = limit_bytes, timeout_s, tick
        self._born = time.time()

    def indexes(self, place: str) -> list[ShardIndex]:
        """Return the indexes of all shards that ``shards.json`` at the URL lists, in order of their names.

        Raises:
            ValueError: one line that names the URL of what is missing or wrong, or the setting that is too small.
        """
        check_url(place)
        self._folder(place).mkdir(parents=True, exist_ok=True)
        names = sorted(self._shared(place, MANIFEST, parse_manifest))
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(lambda name: self._shared_index(place, name), names))
        for index in found:
            if index.extent > self.limit_bytes:
                raise ValueError(
                    f"data.cache_bytes={self.limit_bytes} is too small for {place.rstrip('/')}/{index.shard} "
                    f"({index.extent} bytes)"
                )
        return found

    def open(self, place: str, shard: str, digest: str) -> int:
        """Return a descriptor of the local copy, fetched if need be; while it is open, the copy is not removed.

        Raises:
            ValueError: the shard cannot be fetched, or its index is another one by now.
            OSError: the folder cannot be written.
        """
        path = self._folder(place) / f"{shard.removesuffix('.tar')}-{digest[:16]}.tar"
        assert path.parent.parent == self.directory
        for _ in range(_ATTEMPTS):  # another process may make room just between fetching and opening
            fd = _opened(path)
            if fd is not None:
                return fd
            self._bring(path, place, shard, digest)
        raise ValueError("the cache is too small: the shard was removed before it could be read")

    def _folder(self, place: str) -> Path:
        return self.directory / hashlib.sha256(place.rstrip("/").encode()).hexdigest()[:16]

    def _bring(self, path: Path, place: str, shard: str, digest: str) -> None:
        """Fetch a shard, unless another process does so first, or has just failed to: all of a node wait only once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        note = path.with_suffix(".lock")
        with self._locked(note):
            if path.exists():
                return
            if reason := self._failure(note):
                raise ValueError(reason)
            try:
                index = self._index(place, shard)
                if index.digest != digest:
                    raise ValueError("its index is not the one that the run was started with")
                self._fill(path, f"{place.rstrip('/')}/{shard}", index)
            except (OSError, ValueError) as error:
                reason = f"the shard cannot be fetched: {_why(error)}"
                logger.warning("%s/%s: %s", place.rstrip("/"), shard, reason)
                note.write_text(reason, encoding="utf-8", errors="replace")
                raise ValueError(reason) from error

    def _failure(self, note: Path) -> str:
        """Why a process of this run could not fetch a shard a while ago; empty where none has tried, or it is over."""
        written = note.stat().st_mtime
        recent = written >= self._born and time.time() < written + _ASK_AGAIN_S
        return note.read_text(encoding="utf-8") if recent else ""

    def _fill(self, path: Path, url: str, index: ShardIndex) -> None:
        """Fetch a shard until all of it matches its index; in the end, take what does, if the server sent no more."""
        part = path.with_suffix(".part")
        try:
            self._set_aside(part, index.extent)
            for attempt in range(_ATTEMPTS):
                last = attempt + 1 == _ATTEMPTS
                with part.open("r+b") as file:
                    try:
                        file.truncate(fetch(url, file.write, index.extent, self.timeout_s, self._tick))
                    except OSError:
                        if last:
                            raise
                        continue
                    file.flush()
                    intact = _intact(file.fileno(), index)
                if intact == len(index.offsets) or (last and intact):
                    return os.replace(part, path)
            raise ValueError("nothing of what the server sends matches the index")
        finally:
            part.unlink(missing_ok=True)

    def _set_aside(self, part: Path, size: int) -> None:
        """Make room and take it, by a file of that length.

        Raises:
            OSError: others hold what room there is for too long.
        """
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            with self._locked(self.directory / ".lock"):
                if self._make_room(size):
                    with part.open("wb") as file:
                        file.truncate(size)
                    return
            self._tick()
            time.sleep(_POLL_S)
        raise TimeoutError(0, f"no room for {size} bytes in the cache within {self.timeout_s:g} s")

    def _make_room(self, size: int) -> bool:
        files = [path for pattern in ("*/*.tar", "*/*.part", "*/*.fetched") for path in self.directory.glob(pattern)]
        found = sorted(age_and_size for path in files if (age_and_size := _age_and_size(path)) is not None)
        used = sum(length for _, length, _ in found)
        for _, length, path in found:
            if used + size <= self.limit_bytes:
                break
            if _removed(path):
                used -= length
        return used + size <= self.limit_bytes

    def _index(self, place: str, shard: str) -> ShardIndex:
        return self._parsed(place, index_path(Path(shard)).name, lambda data: parse_index(data, shard))[1]

    def _shared_index(self, place: str, shard: str) -> ShardIndex:
        return self._shared(place, index_path(Path(shard)).name, lambda data: parse_index(data, shard))

    def _shared(self, place: str, name: str, parse: Callable[[bytes], _Parsed]) -> _Parsed:
        """Return what a small file says, as one process of this node has fetched it just now."""
        path = self._folder(place) / f"{name}.fetched"
        with self._locked(path.with_suffix(".lock")):
            try:
                if time.time() - path.stat().st_mtime < _FRESH_S:
                    return parse(path.read_bytes())
            except FileNotFoundError:
                pass
            data, found = self._parsed(place, name, parse)
            write_atomic(path, data)
            return found

    def _parsed(self, place: str, name: str, parse: Callable[[bytes], _Parsed]) -> tuple[bytes, _Parsed]:
        url = f"{place.rstrip('/')}/{name}"
        try:
            data = self._small(url)
            return data, parse(data)
        except (OSError, ValueError) as error:
            raise ValueError(f"{url}: {_why(error)}") from error

    def _small(self, url: str) -> bytes:
        for attempt in range(_ATTEMPTS):
            data = bytearray()
            try:
                fetch(url, data.extend, _INDEX_BYTES, self.timeout_s, self._tick)
                return bytes(data)
            except OSError:
                if attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError("an attempt returns or raises")

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Hold a lock file; wait for it as long as its holder lives, whose own waits are bounded."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not _try_lock(fd, fcntl.LOCK_EX):
                self._tick()
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(fd)


def open_cache(cfg: DataConfig, tick: Tick = lambda: None) -> Cache | None:
    """Return the cache that the settings describe, None where they name no folder."""
    if cfg.cache_dir is None:
        return None
    return Cache(Path(cfg.cache_dir).absolute(), cfg.cache_bytes, cfg.fetch_timeout_s, tick)


def _opened(path: Path) -> int | None:
    """Open a file under a shared lock and mark it as used just now; None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)  # at most as long as it takes somebody to remove it; what is open stays readable
    try:
        os.utime(fd)
    except OSError as error:  # a file of another user: its age then says less
        logger.debug("%s: %s", path, error)
    return fd


def _age_and_size(path: Path) -> tuple[int, int, Path] | None:
    try:
        status = path.stat()
    except FileNotFoundError:  # a part that is complete by now, or given up
        return None
    return status.st_mtime_ns, status.st_size, path


def _removed(path: Path) -> bool:
    """Remove a shard that nobody reads, or a part that nobody writes; return whether it is gone."""
    guard = path.with_suffix(".lock") if path.suffix == ".part" else path
    try:
        fd = os.open(guard, os.O_RDONLY)
    except FileNotFoundError:
        return not path.exists()
    try:
        if not _try_lock(fd, fcntl.LOCK_EX):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)


def _try_lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _intact(fd: int, index: ShardIndex) -> int:
    """Count the members that match their checksums."""
    found = 0
    for offset, size, sha256 in zip(index.offsets.tolist(), index.sizes.tolist(), index.sha256, strict=True):
        if offset + size <= os.fstat(fd).st_size:
            found += hashlib.sha256(os.pread(fd, size, offset)).digest() == sha256.tobytes()
    return found


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
