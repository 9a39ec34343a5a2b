"""Readings of the host and of the processes that run on it for us, by psutil."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil

COUNTERS = ("disk_read_bytes", "disk_write_bytes", "net_tx_bytes", "net_rx_bytes")  # since the machine's start
_FIND_EVERY_S = 30.0  # looking for processes reads a file of every process of the node


class HostReader:
    """Reads the host of this process again and again; from one thread."""

    def __init__(self, directory: Path, first_s: float) -> None:
        """Make a reader.

        Args:
            directory: on the disk whose free space counts.
            first_s: the first utilisation is measured over so many seconds, in which `read` waits; 0 measures it from
                now on, for a reader that is read by the thread that makes it: psutil counts for each thread.
        """
        if not first_s:
            psutil.cpu_percent(None)
        self._directory = directory
        self._own: list[psutil.Process] = []
        self._looked = float("-inf")
        self._first_s: float | None = first_s or None

    def read(self) -> dict[str, float]:
        """Return cpu_util (percent of all cores since the last call), mem_bytes (in use on the host), rss_bytes (of
        this node's ranks and their children, shared pages counted for each), disk_free_bytes, and the bytes of
        `COUNTERS`.

        What this machine does not tell is left out.
        """
        memory = psutil.virtual_memory()
        first_s, self._first_s = self._first_s, None
        readings = {
            "cpu_util": float(psutil.cpu_percent(first_s)),
            "mem_bytes": float(memory.total - memory.available),
            "rss_bytes": self._rss(),
        }
        with suppress(OSError):
            readings["disk_free_bytes"] = float(psutil.disk_usage(str(self._directory)).free)
        with suppress(OSError, RuntimeError):
            if (disk := psutil.disk_io_counters()) is not None:
                readings |= {"disk_read_bytes": float(disk.read_bytes), "disk_write_bytes": float(disk.write_bytes)}
        with suppress(OSError, RuntimeError):
            if (net := psutil.net_io_counters()) is not None:
                readings |= {"net_tx_bytes": float(net.bytes_sent), "net_rx_bytes": float(net.bytes_recv)}
        return readings

    def _rss(self) -> float:
        now = time.monotonic()
        if now - self._looked >= _FIND_EVERY_S:
            self._looked, self._own = now, own_processes()
        total = 0
        for process in self._own:
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return float(total)


def own_processes() -> list[psutil.Process]:
    """Return the processes of this node's ranks: what descends from the one that started this rank, else from it."""
    me = psutil.Process()
    with suppress(psutil.Error):
        parent = me.parent()
        if parent is not None and parent.pid > 1:
            return parent.children(recursive=True)
    return [me, *me.children(recursive=True)]


def own_rss_bytes() -> float:
    """Return the resident memory of this process."""
    return float(psutil.Process().memory_info().rss)
