"""Bytes from a URL through webdataset's openers, bounded in time and in number.

The openers run a program (curl, gsutil, …) for each URL, with arguments and never through a shell. ``pipe:`` URLs,
which are shell commands, are refused.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Callable
from typing import Any

SCHEMES = ("http", "https", "s3", "gs", "hf", "ais")
_PLAIN = re.compile(r"(?P<scheme>[a-z][a-z0-9]*)://[\w.~@:%+,=/-]+", re.ASCII)
_TICK_S = 0.5
_CHUNK_BYTES = 1 << 20
_MIN_BYTES_PER_S = 100_000  # slower than that over a whole file is as good as gone
_CURL = {
    6: "no such host",
    7: "no connection",
    18: "the connection was cut",
    22: "refused or not found",
    28: "timed out",
    52: "an empty answer",
    56: "the connection was cut",
}

Tick = Callable[[], None]


def check_url(url: str) -> None:
    """Refuse what is not a plain URL of a directory that webdataset can open.

    Raises:
        ValueError: one line that names the URL.
    """
    match = _PLAIN.fullmatch(url)
    if url.startswith("pipe:"):
        raise ValueError(f"{url}: commands are refused; give a URL of {', '.join(SCHEMES)}")
    if match is None or match["scheme"] not in SCHEMES:
        raise ValueError(f"{url}: not a URL of shards; expected {', '.join(SCHEMES)}, and no query, brace or command")
    if match["scheme"] not in _openers():
        raise ValueError(f"{url}: webdataset has no opener for {match['scheme']}; see its USE_AIS_FOR")


def fetch(url: str, write: Callable[[bytes], object], limit: int, timeout_s: float, tick: Tick = lambda: None) -> int:
    """Pass at most the first `limit` bytes of `url` to `write`, piece by piece, and return how many there were.

    Fewer than `limit` mean that there are no more.

    Args:
        url: of a file, as `check_url` allows.
        write: takes each piece.
        limit: bytes that are wanted.
        timeout_s: longest silence.
        tick: is called at least twice a second while there is silence.

    Raises:
        OSError: there is no such file, the connection fails or is cut, or nothing comes for `timeout_s`; its strerror
            says so.
    """
    check_url(url)
    stream = _openers()[url.partition(":")[0]](url, "rb", 0)
    process: subprocess.Popen[bytes] = stream.proc
    assert process.stdout is not None
    try:
        received = _pump(process.stdout.fileno(), write, limit, timeout_s, tick)
        if received < limit and (code := process.wait(timeout_s)) != 0:
            raise OSError(0, f"{_CURL.get(code, f'its opener ended with {code}')} after {received} bytes")
        return received
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(0, f"its opener did not end within {timeout_s:g} s") from error
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _pump(fd: int, write: Callable[[bytes], object], limit: int, timeout_s: float, tick: Tick) -> int:
    received = 0
    heard = started = time.monotonic()
    while received < limit:
        tick()
        ready, _, _ = select.select([fd], [], [], _TICK_S)
        now = time.monotonic()
        if now - started > 2 * timeout_s + received / _MIN_BYTES_PER_S:
            raise TimeoutError(0, f"too slow: {received} bytes in {now - started:.0f} s")
        if not ready:
            if now - heard > timeout_s:
                raise TimeoutError(0, f"nothing came for {timeout_s:g} s after {received} bytes")
            continue
        chunk = os.read(fd, min(_CHUNK_BYTES, limit - received))
        if not chunk:
            break
        write(chunk)
        received += len(chunk)
        heard = now
    return received


def _openers() -> dict[str, Callable[..., Any]]:
    from webdataset.gopen import gopen_schemes  # takes a second to import

    found: dict[str, Callable[..., Any]] = gopen_schemes
    return found
