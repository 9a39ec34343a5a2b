"""One function over many items, in processes; results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_PRELOAD = [f"{__package__}.writer", "webdataset"]  # what takes seconds to import, once for all processes


def each(function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> Iterator[_Result]:
    """Yield ``function(item)`` for each item; in this process where one worker, or one item, is all there is.

    The processes are started afresh, hold nothing of this one (no lock, no file), and die with it.

    Raises:
        Exception: what `function` raised.
        concurrent.futures.process.BrokenProcessPool: a process died.
    """
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with ProcessPoolExecutor(min(workers, len(items)), context, initializer=_begin) as pool:
        try:
            for future in [pool.submit(function, item) for item in items]:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # The kernel can't do it (prctl): to it the parent is the fork server, which lives as long as its children.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(128 + signal.SIGKILL)
