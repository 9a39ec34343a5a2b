"""The files that one rank writes of a save: at once, or by a thread while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_vlmr1.checkpoint import store
from megatron_vlmr1.checkpoint.store import Listing


class Writes:
    """This rank's part of a save below `directory`: written, flushed and hashed without any collective.

    The first failure is kept and the rest left undone, so that a rank whose disk fails joins the collectives that
    follow like all others.
    """

    def __init__(self, directory: Path, later: bool) -> None:
        """Begin; with `later`, what is added waits for `start`, and everything that it needs is kept until then."""
        self._directory, self._later = directory, later
        self._waiting: list[Callable[[], Iterable[Path]]] = []
        self._paths: list[Path] = []
        self._listing: Listing = {}
        self._problem = ""
        self._bug: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._begun = time.perf_counter()
        self.seconds = 0.0  # from the beginning to the last write's end

    def add(self, write: Callable[[], Iterable[Path]]) -> None:
        """Take on a piece of work: it writes files and returns their paths, raises OSError where it cannot."""
        if self._later:
            self._waiting.append(write)
        else:
            self._attempt(write)

    def start(self) -> None:
        """Let a thread write, flush and hash what was added, or do here what is left of that."""
        if self._later:
            # A daemon: a rank that crashes must not wait for its disk.
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()

    def done(self) -> bool:
        """Whether nothing is left to write on this rank."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> tuple[str, Listing]:
        """Wait until everything is written and, after `start`, on the disk.

        Returns:
            What went wrong, or nothing; and after `start` size and sha256 of each file by its path below the directory.
        """
        if self._thread is not None:
            self._thread.join()
        if self._bug is not None:
            raise self._bug
        return self._problem, self._listing

    def _run(self) -> None:
        try:
            while self._waiting:
                self._attempt(self._waiting.pop(0))  # and forget what it holds of memory
            self._attempt(self._prove)
            self.seconds = time.perf_counter() - self._begun
        except BaseException as error:  # raised again where somebody waits for it
            self._bug = error

    def _prove(self) -> list[Path]:
        self._listing = store.prove(self._directory, self._paths)
        return []

    def _attempt(self, write: Callable[[], Iterable[Path]]) -> None:
        if not self._problem:
            try:
                self._paths += write()
            except OSError as error:
                self._problem = str(error) or repr(error)
