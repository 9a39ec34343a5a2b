"""A directory in the making: it lies beside its name, one process works on it, and it is named when it is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from megatron_vlmr1.checkpoint import store

_SPARE_BYTES = 1 << 26  # of disk space, for everything but weights


def path_of(out: Path) -> Path:
    """Return where a directory is made."""
    return out.with_name(out.name + ".partial")


def check_new(out: Path, source: Path) -> None:
    """Refuse a directory that exists, or that would be a part of what it is made of.

    Raises:
        ValueError: it does, or is.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; name a new directory")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out}: lies in {source}, which it is made of; name a directory elsewhere")


def make(
    out: Path, plan: str, prepare: Callable[[], None], write: Callable[[], None], complete: Callable[[], None]
) -> None:
    """Make a directory in `path_of(out)`, where an interrupted attempt with the same plan has left off, and name it.

    In a job all ranks call it.

    Args:
        out: new directory.
        plan: what must be the same for an attempt to go on with what another has left.
        prepare: done by the first rank, before anything is written.
        write: done by all ranks: each one's share of the work.
        complete: done by the first rank, when all shares are there.

    Raises:
        ValueError: the directory is somebody else's, or the disk is too small or fills up.
        OSError: the disk failed; nothing was published.
    """
    from megatron_vlmr1.runtime import distributed  # imports torch, which what is made by one process can do without

    place = path_of(out)
    with ExitStack() as held:

        def begin() -> None:
            with room(place):
                held.enter_context(making(out, plan))
                prepare()

        def share() -> None:
            with room(place):
                write()

        def end() -> None:
            with room(place):
                complete()
                publish(out)

        distributed.together(begin, only_first=True)
        distributed.together(share)
        distributed.together(end, only_first=True)


@contextmanager
def making(out: Path, plan: str) -> Iterator[Path]:
    """Make ``OUT.partial``, or go on in what an interrupted attempt with the same plan has left; another's is removed.

    The plan lies beside it in ``OUT.partial.json``, which is locked as long as the block lasts. An error leaves what
    there is for the next attempt. Call `publish` at the end of the block.

    Raises:
        ValueError: somebody else is at it, or there is a directory of that name that no attempt has begun.
    """
    partial = path_of(out)
    note = partial.with_name(partial.name + ".json")
    if partial.exists() and not note.is_file():
        raise ValueError(
            f"{partial}: exists and was not left by an interrupted command; remove it or name another directory"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{out.parent}: not a directory") from error
    with note.open("a+", encoding="utf-8") as file:
        _lock(file, out)
        try:
            file.seek(0)
            if file.read() != plan:
                if partial.exists():
                    shutil.rmtree(partial)
                file.truncate(0)
                file.write(plan)
                file.flush()
            partial.mkdir(exist_ok=True)
            yield partial
        finally:
            if partial.exists() and not any(partial.iterdir()):
                partial.rmdir()
            if not partial.exists():
                note.unlink(missing_ok=True)


def publish(out: Path) -> None:
    """Give a finished directory its name.

    Raises:
        OSError: the disk failed.
    """
    partial = path_of(out)
    store.flush_tree(partial)
    partial.rename(out)


def need_space(directory: Path, size: int) -> None:
    """Ask whether so many bytes of weights fit on the disk.

    Raises:
        ValueError: they don't.
    """
    free = shutil.disk_usage(directory).free
    if size + _SPARE_BYTES > free:
        raise ValueError(
            f"{directory}: {size / 1e9:.1f} GB are to be written, but the disk has {free / 1e9:.1f} GB left"
        )


@contextmanager
def room(directory: Path) -> Iterator[None]:
    """Tell a disk that fills up while `directory` is written, which the user can mend, from one that fails.

    Raises:
        ValueError: it is full.
    """
    try:
        yield
    except OSError as error:  # known by its text: what a library or another rank has passed on has no number
        full = [text for number in (errno.ENOSPC, errno.EDQUOT) if (text := os.strerror(number)) in str(error)]
        if not full:
            raise
        raise ValueError(f"{directory}: {full[0]}; make room and give the same command again") from error


def _lock(file: IO[str], out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out}: another process is making it") from error
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):  # file systems without locks
            raise
    if os.fstat(file.fileno()).st_nlink == 0:  # that other process finished between opening and locking
        raise ValueError(f"{out}: another process has made it")
