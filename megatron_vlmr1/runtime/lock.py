"""One job at a time in a directory."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold ``directory/.lock`` for the block; the kernel lets go of it when the process dies, however it dies.

    Raises:
        ValueError: another process holds it; one line.
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(
            f"{directory}: another job is running in this directory; wait for it, or name another"
        ) from error
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked against a second job: %s", directory, error)
    try:
        yield
    finally:
        os.close(handle)
