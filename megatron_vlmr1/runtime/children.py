"""Child processes that never outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Collection

import psutil

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here, not in a forked child, where a lock may be held for ever


def die_with_parent(parent: int | None = None) -> None:
    """Called in a child: from now on the kernel kills it (SIGKILL) as soon as its parent is gone, however it went.

    As ``preexec_fn=functools.partial(die_with_parent, os.getpid())`` or first thing in a worker's own code. The
    setting survives exec; the child's own children have to ask for themselves. To the kernel the parent is the
    *thread* that started the child, so that thread has to live as long as the child.

    Args:
        parent: process id of the parent, if known: a child whose parent died before this call then ends at once.

    Raises:
        OSError: the kernel refuses (not Linux, or a seccomp filter).
    """
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def kill_sessions(sessions: Collection[int]) -> list[int]:
    """Kill (SIGKILL) every process of these sessions, grandchildren and orphans included.

    A process started with ``start_new_session=True`` leads a session of its own number, and so do all its descendants
    but those that left it.

    Returns:
        The process ids that were killed; zombies don't count.
    """
    killed = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) in sessions and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        except (ProcessLookupError, psutil.NoSuchProcess, PermissionError):
            continue  # gone meanwhile, or not ours
    return killed
