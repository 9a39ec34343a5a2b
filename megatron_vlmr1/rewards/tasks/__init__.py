"""What each task asks, parses, rewards and measures. One file per task, found by its file name."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_vlmr1.rewards.task import Task


def names() -> list[str]:
    """Return the names of the known tasks."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Task:
    """Return a task by name.

    Raises:
        ValueError: no such task; the message lists the known ones.
    """
    if name not in names():
        raise ValueError(f"task: no task named {name}; known: {', '.join(names())}")
    task = importlib.import_module(f"{__name__}.{name}").TASK
    assert isinstance(task, Task)
    return task
